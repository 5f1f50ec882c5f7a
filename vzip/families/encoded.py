"""What an attached model has encoded last: its positions depend on the tokens that stay.

A model of the Qwen-VL type computes positions in `get_rope_index`, from token ids and grids. Its
`forward` encodes the pictures before it asks for positions, and `generate` afterwards. So an attached
model remembers which tokens its encoder has kept, and `get_rope_index` encodes pictures itself if
nobody has done it yet.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vzip.errors import UserError
from vzip.families.base import Family
from vzip.families.features import VisualFeatures
from vzip.families.install import replace_method
from vzip.families.positions import first_of_rows, grid_places, grid_positions
from vzip.media import PIXEL_NAMES, MediaInputs
from vzip.reducers.base import Reducer

NAME = "vzip_encoded"
"""Name of the `Encoded` among the attributes of the inner module."""


@dataclass
class Encoded:
    """What a model instance has encoded, by kind of media."""

    latest: dict[str, VisualFeatures] = field(default_factory=dict)
    """Which tokens stay, without the tokens."""
    ahead: dict[str, tuple[Tensor, VisualFeatures]] = field(default_factory=dict)
    """Pixels that were encoded for their positions, and their features, until the model asks."""

    def features(
        self, family: Any, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Return the features of pixels that were encoded ahead, or encode them."""
        pixels, features = self.ahead.pop(kind, (None, None))
        if features is None or pixels is not inputs.pixels:
            features = family.visual_features(kind, inputs, reducer, **options)
            self.latest[kind] = replace(features, features=features.features[:0])
        return features

    def encode_ahead(self, family: Any, kind: str, inputs: MediaInputs, reducer: Reducer) -> None:
        """Encode pixels before the model asks for them, and keep their features until then."""
        features = self.features(family, kind, inputs, reducer)
        self.ahead[kind] = (inputs.pixels, features)


def encoded_by(family: Any) -> Encoded:
    """Return what the family's model has encoded."""
    encoded: Encoded = vars(family.model.model)[NAME]
    return encoded


def install_positions(family: Any, reducer: Reducer) -> None:
    """Make a model instance number its tokens by those that the reducer keeps."""
    setattr(family.model.model, NAME, Encoded())
    replace_method(family, "get_rope_index", _rope_index_method(family, reducer))


def uninstall_positions(family: Any) -> None:
    """Give the model instance its own positions back."""
    del family.model.model.get_rope_index
    delattr(family.model.model, NAME)


def _rope_index_method(family: Any, reducer: Reducer) -> Callable[..., Any]:
    """Make a `get_rope_index` that knows which tokens stay."""
    method = type(family.model.model).get_rope_index
    signature = inspect.signature(method)
    family_class = type(family)

    @functools.wraps(method)
    def get_rope_index(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        arguments = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        more_arguments = arguments.pop("kwargs", {})
        arguments |= more_arguments

        # As in the other patched methods, `self` may be a copy of the family's inner module.
        adapter = family_class(SimpleNamespace(config=self.config, model=self))
        return _rope_index(adapter, reducer, arguments)

    return get_rope_index


def _rope_index(family: Any, reducer: Reducer, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return what `get_rope_index` returns, for the tokens that stay.

    Returns:
        Positions int64[3, B, L], and `rope_deltas` int64[B, 1]: what is added to the index of a later
        token to get its position.

    Raises:
        UserError: a video for a family that takes none, or placeholders that do not fit the tokens.
    """
    input_ids = arguments["input_ids"]
    if arguments.get("video_grid_thw") is not None and "video" not in family.kinds:
        raise UserError(f"a reducer for {family.model_type!r} models takes no videos; give images alone")

    encoded = encoded_by(family)
    features = {}
    for kind in family.kinds:
        if arguments.get(f"{kind}_grid_thw") is None:
            continue
        if any(arguments.get(name) is not None for name in PIXEL_NAMES[kind]):
            inputs = MediaInputs.from_processed(kind, arguments)
            encoded.encode_ahead(family, kind, inputs, reducer)
        features[kind] = _checked(family, kind, encoded, arguments)

    counted = torch.ones_like(input_ids, dtype=torch.bool)
    if arguments.get("attention_mask") is not None:
        counted = arguments["attention_mask"].bool()

    num_rows, length = input_ids.shape
    positions, reach = family.positions_and_reach(
        input_ids.flatten(),
        features,
        counted=counted.flatten(),
        first=first_of_rows(input_ids).flatten(),
    )
    # A picture may take more positions than it has tokens, or fewer.
    next_position = reach.view(num_rows, length).amax(dim=1, keepdim=True)
    rope_deltas = next_position - counted.sum(dim=1, keepdim=True)
    return positions.reshape(3, num_rows, length).to(input_ids.dtype), rope_deltas


def _checked(family: Any, kind: str, encoded: Encoded, arguments: dict[str, Any]) -> VisualFeatures:
    """Return which tokens of the media stay. Raises UserError unless they fit the placeholders."""
    features = encoded.latest.get(kind)
    num_placeholders = int((arguments["input_ids"] == family.placeholder_id(kind)).sum())
    if features is None or features.kept is None or len(features.kept) != num_placeholders:
        num_kept = 0 if features is None or features.kept is None else len(features.kept)
        raise UserError(
            f"the text has {num_placeholders} placeholders of {kind}s, and the model has encoded "
            f"{num_kept} tokens; use the handle's processor, and give the pixels with the text"
        )

    # `forward` learns how long the steps of a video are only after it has encoded them.
    if kind == "video" and arguments.get("second_per_grid_ts") is not None:
        inputs = MediaInputs(
            features.features,
            {name: torch.as_tensor(arguments[name]) for name in ("video_grid_thw", "second_per_grid_ts")},
        )
        features = replace(features, grids=family.grids_of_tokens(kind, inputs))
    return features


class GridPositions(Family):
    """The base of families whose visual tokens have positions of time, row and column."""

    has_grids: ClassVar[bool] = True

    # ---- Positions ----

    def text_arguments(self, input_ids: Tensor) -> dict[str, Tensor]:
        # The model looks for positions of pictures only if it is told where they are.
        types = torch.zeros_like(input_ids)
        for number, kind in enumerate(self.kinds, start=1):
            types += number * (input_ids == self.placeholder_id(kind))
        return {"mm_token_type_ids": types}

    def positions(
        self,
        input_ids: Tensor,
        features: Mapping[str, VisualFeatures],
        *,
        counted: Tensor,
        first: Tensor,
    ) -> Tensor | None:
        positions, _ = self.positions_and_reach(input_ids, features, counted=counted, first=first)
        return positions

    def positions_and_reach(
        self,
        input_ids: Tensor,
        features: Mapping[str, VisualFeatures],
        *,
        counted: Tensor,
        first: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return what `vzip.families.positions.grid_positions` returns."""
        places = []
        for kind, media in features.items():
            places.append((self.placeholder_id(kind), grid_places(media)))
        return grid_positions(input_ids, places, counted=counted, first=first)

    # ---- Patching one model instance ----

    def install(self, reducer: Reducer) -> None:
        super().install(reducer)
        install_positions(self, reducer)

    def uninstall(self) -> None:
        super().uninstall()
        uninstall_positions(self)

    def features_for_model(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Compute the features, and remember which tokens stay: the model asks for positions later."""
        return encoded_by(self).features(self, kind, inputs, reducer, **options)
