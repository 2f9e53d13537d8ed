"""From YAML and command line to frozen dataclasses: every key is known, given once, and typed.

The parsing is jsonargparse's (safe YAML loader). It accepts a key twice, the last one winning, and names no neighbour
for a misspelt one: those two are checked here, on the syntax tree, where the line is still known.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

Config = TypeVar("Config")
PARSER_OPTIONS = ("config", "help", "print_config")


def load_config(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """Build a config from `--config file.yaml` and `--section.field value` arguments; later ones win.

    Args:
        config_class: a dataclass whose fields are values or further dataclasses (sections).
        arguments: the command line without the program's name.

    Returns:
        An instance of `config_class`. `1e-3` is a float in YAML too, and an explicit zero stays zero.

    Raises:
        ValueError: for an unknown key (with the nearest known one), a key given twice in a file (with both lines), or
            a value of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file; may be given more than once")
    parser.add_class_arguments(config_class, None)
    keys = tuple(field_keys(config_class))

    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        key, has_value, value = argument[2:].partition("=")
        if key not in PARSER_OPTIONS:
            _check_key(key, keys, where=f"--{key}")
        elif key == "config":
            following = arguments[position + 1 : position + 2]
            for path in [value] if has_value else following:
                check_yaml(Path(path), keys)
    try:
        parsed = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    sections = parser.instantiate(parsed).as_dict()
    sections.pop("config", None)
    return config_class(**sections)


def check_yaml(path: Path, keys: Sequence[str]) -> None:
    """Refuse a YAML file with a key that is unknown or given twice.

    Args:
        path: the file.
        keys: the known keys, sections joined by dots; one that ends in `.*` takes any key below it.

    Raises:
        ValueError: naming the file, the line, and for an unknown key the nearest known one.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected keys with values, such as 'seed: 1'")
    if root is not None:
        _check_node(root, "", path, keys)


def _check_node(node: yaml.MappingNode, prefix: str, path: Path, keys: Sequence[str]) -> None:
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = prefix + str(key_node.value), key_node.start_mark.line + 1
        if key in first_lines:
            raise ValueError(f"{path}, line {line}: '{key}' is given twice, first on line {first_lines[key]}")
        first_lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _check_key(key, _sections(keys), where=f"{path}, line {line}: '{key}'")
            _check_node(value_node, f"{key}.", path, keys)
        else:
            _check_key(key, [*keys, *_sections(keys)], where=f"{path}, line {line}: '{key}'")


def _check_key(key: str, keys: Sequence[str], *, where: str) -> None:
    parent = key.rpartition(".")[0]
    if key in keys or f"{parent}.*" in keys:
        return
    known = [k for k in keys if not k.endswith(".*")]
    name = key.rpartition(".")[2]
    # A right name in the wrong section first: 'train.lr' is 'optimizer.lr', not 'train.steps'.
    near = [k for k in known if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    remedy = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"{where} is not an option; {remedy}")


def field_keys(config_class: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values of a nested dataclass; a free dictionary `d` gives both `d` and `d.*`."""
    for field in dataclasses.fields(config_class):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from field_keys(field.type, f"{name}.")
            continue
        yield name
        if get_origin(field.type) is dict:
            yield f"{name}.*"


def _sections(keys: Sequence[str]) -> list[str]:
    return sorted({key.rpartition(".")[0] for key in keys if "." in key})
