"""Folders from somebody else that hold code. Nothing of it may run."""

import json
import pickle
import random
import shutil
from pathlib import Path

import torch
import yaml

from tests.faults.world import World, check_end, module
from tests.helpers.damage import Trap

EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlavaProcessor as Evil
"""
"""A module that leaves a trace when it is imported."""


class Stranger:
    """A copy of a run, or of its base model, into which a trial puts code.

    Attributes:
        marker: the file that the code makes.
        run: the run's folder.
        base: the base model's folder.
    """

    def __init__(self, folder: Path, run: Path, base: Path) -> None:
        self.marker = folder / "ran"
        self.run = Path(shutil.copytree(run, folder / "run"))
        self.base = Path(shutil.copytree(base, folder / "base"))
        self.meta = self.run / "meta.json"
        if self.meta.is_file():
            base = json.loads(self.meta.read_text())["base"]
            self._edit_json(self.meta, base={**base, "id": str(self.base)})

    @staticmethod
    def _edit_json(path: Path, **changes: object) -> None:
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, **changes}))

    def _edit_settings(self, group: str, name: str, value: object) -> None:
        path = self.run / "config.yaml"
        settings = yaml.safe_load(path.read_text())
        settings[group][name] = value
        path.write_text(yaml.safe_dump(settings))

    def _pickle(self, path: Path) -> None:
        path.write_bytes(pickle.dumps({"x": Trap(self.marker)}))

    def no_code(self) -> None:
        """Change nothing: the commands must all do their work."""

    def pickled_projector(self) -> None:
        self._pickle(self.run / "projector.safetensors")

    def torch_projector(self) -> None:
        torch.save({"x": Trap(self.marker)}, self.run / "projector.safetensors")

    def pickled_state(self) -> None:
        for file in (self.run / "state").rglob("*.*"):
            self._pickle(file)

    def state_of_deepspeed(self) -> None:
        state = self.run / "state"
        (state / "step5").mkdir(parents=True, exist_ok=True)
        (state / "latest").write_text("step5")
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            torch.save({"module": Trap(self.marker)}, state / "step5" / name)

    def template_target(self) -> None:
        target = {"_target_": "os.makedirs", "name": str(self.marker)}
        self._edit_settings("model", "template", target)

    def template_from_hub(self) -> None:
        (self.run / "hubconf.py").write_text(EVIL.format(marker=str(self.marker)))
        target = {
            "_target_": "torch.hub.load",
            "repo_or_dir": str(self.run),
            "source": "local",
            "model": "Evil",
        }
        self._edit_settings("model", "template", target)

    def reducer_target(self) -> None:
        self._edit_settings("reducer", "_target_", "os.makedirs")
        self._edit_settings("reducer", "name", str(self.marker))

    def meta_target(self) -> None:
        target = {"_target_": "os.makedirs", "name": str(self.marker)}
        meta = json.loads((self.meta).read_text())
        self._edit_json(self.meta, template=target, reducer={**meta["reducer"], **target})

    def template_in_jinja(self) -> None:
        code = "{{ cycler.__init__.__globals__.os.makedirs('" + str(self.marker) + "') }}"
        (self.base / "chat_template.jinja").write_text(code)
        self._edit_json(self.meta, template={"chat_template": code})

    def code_of_the_processor(self) -> None:
        (self.base / "evil.py").write_text(EVIL.format(marker=str(self.marker)))
        maps = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            if (self.base / file).is_file():
                self._edit_json(self.base / file, **maps)

    def code_of_the_model(self) -> None:
        (self.base / "evil.py").write_text(EVIL.format(marker=str(self.marker)))
        maps = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        self._edit_json(self.base / "config.json", **maps)

    def pickled_base(self) -> None:
        (self.base / "model.safetensors").unlink()
        torch.save({"x": Trap(self.marker)}, self.base / "pytorch_model.bin")

    def pickled_adapter(self) -> None:
        adapter = self.run / "adapter"
        adapter.mkdir()
        config = {
            "peft_type": "LORA",
            "r": 2,
            "target_modules": ["q_proj"],
            "auto_mapping": {"parent_library": "evil"},
        }
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        torch.save({"x": Trap(self.marker)}, adapter / "adapter_model.bin")
        self._edit_json(self.meta, adapter=True)


TRICKS = [
    Stranger.no_code,
    Stranger.pickled_projector,
    Stranger.torch_projector,
    Stranger.pickled_state,
    Stranger.state_of_deepspeed,
    Stranger.template_target,
    Stranger.template_from_hub,
    Stranger.reducer_target,
    Stranger.meta_target,
    Stranger.template_in_jinja,
    Stranger.code_of_the_processor,
    Stranger.code_of_the_model,
    Stranger.pickled_base,
    Stranger.pickled_adapter,
]


def strangers(world: World, rng: random.Random, number: int) -> None:
    """Open a stranger's run in every way that a user would."""
    trick = TRICKS[number % len(TRICKS)]
    world.description = trick.__name__.replace("_", " ")
    is_state = "state" in trick.__name__
    folder = world.folder / f"stranger-{number}"
    run = world.stopped(f"stranger-{number}") if is_state else world.reference("evaluate.questions=4")
    folder.mkdir()
    stranger = Stranger(folder, run, world.folder / "model")
    trick(stranger)

    # A state is resumed. A finished run is opened, and a new one starts from its base model.
    if is_state:
        commands = [["train/tune.py", *world.settings("run", f"runs={folder}")]]
    else:
        commands = [
            [world.load_script, stranger.run],
            module("scripts.export.main", stranger.run, "hf", "--out", folder / "exported"),
            module("scripts.figures.main", stranger.run, "--figures", "recovery"),
            ["train/tune.py", *world.settings("new", f"runs={folder}", base=stranger.base)],
        ]
    for command in commands:
        done = world.run(*command)
        assert not stranger.marker.exists(), f"its code ran: {command[:2]}"
        check_end(done, 0, *([] if trick is Stranger.no_code else [2]))
