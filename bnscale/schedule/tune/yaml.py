"""A cluster file against Ray's own schema, without a cloud: what `ray up` would say after minutes, or never."""

import contextlib
import copy
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from bnscale.trial import Refusal, near

FILL_IN = "FILL-IN"  # what our templates say where a value is the user's own


def check_yaml(file: Path) -> list[str]:
    """The places that are still to be filled in, such as `provider.head_ip`.

    Raises `Refusal` for a file that cannot be read and for the first thing that Ray does not know, with the nearest
    that it does.
    """
    try:
        asked = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"{file}: cannot be read ({(error.strerror or str(error)).lower()})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"{file}: is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(asked, dict):
        raise Refusal(f"{file}: is no cluster file; Ray wants keys such as cluster_name and provider")
    for place in _keys(asked):
        if not isinstance(place[-1], str):
            where, kind = ".".join(map(str, place)), type(place[-1]).__name__
            raise Refusal(f"{file}: the key {where} is read as {kind}, and Ray wants text; put it in quotes")
    if "apiVersion" in asked:
        raise Refusal(f"{file}: is for Kubernetes; `kubectl apply --dry-run=server -f {file}` asks the cluster itself")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    for flaw in jsonschema.Draft7Validator(schema).iter_errors(asked):
        if flaw.validator == "additionalProperties":
            known = list(flaw.schema["properties"])
            unknown = next(name for name in flaw.instance if name not in known)
            raise Refusal(_unknown(file, [*flaw.absolute_path, unknown], known))
    for name in schema["required"]:
        if name not in asked:
            raise Refusal(f"{file}: has no {name}, which Ray asks for; the files in cluster/ show one")
    provider = asked.get("provider")
    if isinstance(provider, dict):  # each provider knows keys that the schema does not, so only slips are told
        known = list(schema["properties"]["provider"]["properties"])
        for name in provider:
            if name not in known and not near(name, known).endswith("."):
                raise Refusal(_unknown(file, ["provider", name], known))
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its advice
            validate_config(prepare_config(copy.deepcopy(asked)))
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise Refusal(f"{file}, {where}: {error.message}; `ray up` would refuse it") from None
    except Exception as error:  # of every provider's own
        said = str(error).strip().splitlines()
        raise Refusal(f"{file}: `ray up` would refuse it: {said[0] if said else type(error).__name__}") from None
    return [".".join(map(str, place)) for place, value in _leaves(asked) if FILL_IN in str(value)]


def _unknown(file: Path, place: list[Any], known: list[str]) -> str:
    *above, name = map(str, place)
    close = near(name, known)
    legal = "" if not close.endswith(".") else f"; its keys are {', '.join(sorted(known))}"
    return (
        f"{file}: {'.'.join(above) or 'a cluster file'} has no key {name}{close.rstrip('.')}{legal} "
        f"Mend it, then `bnscale doctor --yaml {file}`"
    )


def _keys(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all mappings in it, with what is above."""
    below = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, each in below:
        if isinstance(value, Mapping):
            yield (*place, name)
        yield from _keys(each, (*place, name))


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(each, (*place, name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, (*place, number))
    else:
        yield place, value
