"""Damage to files of weights."""

import torch


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def empty(path):
    path.write_bytes(b"")


def write_html(path):
    path.write_bytes(b"<html>not found</html>" * 20)


def write_lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def save_nested(path):
    torch.save({"model": {"x": torch.zeros(1)}}, path)


def save_by_number(path):
    torch.save({0: torch.zeros(1)}, path)


def save_bare_tensor(path):
    torch.save(torch.zeros(1), path)


DAMAGES = [cut, empty, write_html, write_lfs_pointer, save_nested, save_by_number, save_bare_tensor]


class Trap:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))
