"""A network of the user's own: its source, its signature, and a check before anything is spent.

A reference is FILE.py:NAME, a file that imports installed packages only, or package.module:NAME.
The class or function takes `num_classes` and, where it has them, `dropout` and further arguments of
type int, float, bool or str; it returns a module that turns float images (N, 3, H, W) into logits
(N, num_classes).

The source's text is part of the recipe: its digest is in the config, the text in the record. A file
is loaded from that text, so that a file which was changed since changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import linecache
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tune_cifar.dataset import DataDescription
from tune_cifar.errors import ConfigError, did_you_mean
from tune_cifar.schema import TrainConfig

# A process that checks a network has this long; importing torch takes seconds.
CHECK_SECONDS = 120.0
RESERVED = ("num_classes", "dropout")
KINDS: dict[Any, type] = {kind: kind for kind in (int, float, bool, str)}
KINDS |= {kind.__name__: kind for kind in (int, float, bool, str)}
# Rows of logits of two images whose values are not negative and sum to 1 are probabilities.
SUM_TOLERANCE = 1e-3

# Texts of sources by their digests, as far as this process knows them.
_texts: dict[str, str] = {}


@dataclass(frozen=True)
class Argument:
    """An argument of a network's constructor beside num_classes and dropout."""

    name: str
    kind: str
    """int, float, bool or str."""
    default: Any
    """None where the constructor has none."""
    is_required: bool = False
    """Whether the recipe must give it."""


@dataclass(frozen=True)
class Network:
    """What is known of a network after its check.

    Attributes:
        digest: of the source.
        source: the text of the file that defines it.
        takes_dropout: whether it has the argument `dropout`.
        arguments: the others, in their order.
    """

    digest: str
    source: str
    takes_dropout: bool
    arguments: tuple[Argument, ...]


def digest_source(text: str) -> str:
    """Return 16 hexadecimal digits that name a source."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def add_source(text: str) -> str:
    """Make a source known to this process, and return its digest."""
    digest = digest_source(text)
    _texts[digest] = text
    return digest


def find_file(reference: str, folder: Path) -> Path | None:
    """Return the file of a reference, beside a space file or at its path; None for a module.

    Raises:
        ConfigError: there is no such file.
    """
    where, name = reference.rsplit(":", 1)
    if not where.endswith(".py"):
        return None
    places = [folder / where, Path(where)]
    for path in places:
        if path.is_file():
            return path
    looked = " or ".join(dict.fromkeys(str(path) for path in places))
    raise ConfigError(f"model: the file of {name} must be there, got no {looked}.")


def build_own(config: TrainConfig, data: DataDescription) -> nn.Module:
    """Build a network of the user's own on the CPU.

    Raises:
        ConfigError: its source is not known to this process, or is another than the config's.
    """
    factory = load_factory(config.model, config.model_digest)
    arguments = dict(config.model_args)
    if "dropout" in inspect.signature(factory).parameters:
        arguments["dropout"] = config.dropout
    model: nn.Module = factory(num_classes=data.num_classes, **arguments)
    return model


def build_with_defaults(reference: str, data: DataDescription) -> nn.Module:
    """Build a network in this process, from its file or module as it is now.

    Raises:
        ConfigError: it cannot be imported, or an argument has no default.
    """
    file = find_file(reference, Path())
    where = reference.rsplit(":", 1)[0]
    try:
        factory = _import(reference, None if file is None else file.read_text(encoding="utf-8"))
        model: nn.Module = factory(num_classes=data.num_classes)
    except ConfigError:
        raise
    except Exception as exc:
        raise ConfigError(_describe_exception(exc, where)) from exc
    return model


@functools.lru_cache(maxsize=8)
def load_factory(reference: str, digest: str) -> Callable[..., Any]:
    """Return the class or function of a reference.

    Sources of one name and different texts are different modules: a warm worker does not mix them.

    Raises:
        ConfigError: its source is not known to this process, or a module has changed.
    """
    where, name = reference.rsplit(":", 1)
    if where.endswith(".py"):
        if digest not in _texts:
            raise ConfigError(f"model: the source of {reference} ({digest}) is not known here.")
        return _get(_load_text(where, _texts[digest], digest), name, reference)
    factory = _get(importlib.import_module(where), name, reference)
    found = digest_source(_read_source(factory))
    if found != digest:
        hint = "Install the version that was recorded, or put the class into a file of its own."
        problem = f"the source of {reference} must be the recorded one, {digest}, got {found}"
        raise ConfigError(f"model: {problem}. {hint}")
    return factory


def _load_text(file: str, text: str, digest: str) -> ModuleType:
    """Run a source's text as a module; tracebacks show the file's name and its lines."""
    module = ModuleType(f"tune_cifar_network_{digest}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their module up
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def _get(module: ModuleType, name: str, reference: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        hint = did_you_mean(name, known)
        raise ConfigError(f"model: {reference} must be a class or function, got none.{hint}")
    return found  # type: ignore[no-any-return]


def _read_source(factory: Callable[..., Any]) -> str:
    file = inspect.getsourcefile(inspect.unwrap(factory))  # behind decorators
    return Path(file or "").read_text(encoding="utf-8")


def read_arguments(factory: Callable[..., Any], where: str) -> tuple[bool, tuple[Argument, ...]]:
    """Return whether a constructor takes dropout, and its further arguments.

    Raises:
        ConfigError: it takes no num_classes, or an argument of an unknown type without a default.
    """
    parameters = inspect.signature(factory).parameters
    takes_all = any(found.kind is found.VAR_KEYWORD for found in parameters.values())
    if "num_classes" not in parameters and not takes_all:
        got = ", ".join(parameters) or "none"
        raise ConfigError(f"{where}: the constructor must take num_classes, got {got}.")
    arguments = []
    for name, found in parameters.items():
        if name in RESERVED or found.kind not in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY):
            continue
        has_default = found.default is not found.empty
        kind = KINDS.get(found.annotation) or KINDS.get(type(found.default))
        if kind is None:
            if has_default:  # such as a layer's class: it stays as it is
                continue
            types = "int, float, bool or str"
            raise ConfigError(f"{where}: argument {name} must be annotated as {types}.")
        default = found.default if has_default else None
        arguments.append(Argument(name, kind.__name__, default, is_required=not has_default))
    return "dropout" in parameters, tuple(arguments)


def check_network(
    config: TrainConfig,
    data: DataDescription,
    folder: Path,
    needs_all: bool = True,
    batch_sizes: Sequence[int] = (),
) -> Network:
    """Import, build and try a network in a process of its own.

    Two images go through it forward and backward, in training and in evaluation, in both memory
    formats.

    Args:
        folder: of the space file.
        batch_sizes: that a search would try beside the config's.
        needs_all: refuse a config that lacks an argument; else such a network is not built.

    Raises:
        ConfigError: one sentence with file and line on the first rule that it breaks.
    """
    request = make_request(config, data, folder, batch_sizes)
    # A file is tried once in a process; what a package holds may change behind its name.
    try_once = _try_elsewhere if request["source"] is not None else _try_elsewhere.__wrapped__
    answer = try_once(config.model, json.dumps(request))
    if needs_all and answer["missing"]:
        raise ConfigError(answer["missing"])
    arguments = tuple(Argument(**found) for found in answer["arguments"])
    text = answer["source"]
    return Network(digest_source(text), text, answer["takes_dropout"], arguments)


@functools.lru_cache(maxsize=32)
def _try_elsewhere(reference: str, request: str) -> dict[str, Any]:
    """Return `try_network`'s answer from a process of its own; raise the problem."""
    command = [sys.executable, "-m", "tune_cifar.models.custom"]
    try:
        run = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=CHECK_SECONDS
        )
        answer: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired as exc:
        problem = f"two images must go through it in {CHECK_SECONDS:.0f} s, got more"
        raise ConfigError(f"{reference}: {problem}.") from exc
    except (json.JSONDecodeError, IndexError) as exc:
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        problem = f"the process that tried it ended with status {run.returncode}"
        raise ConfigError(f"{reference}: {problem}: {last}") from exc
    if "problem" in answer:
        raise ConfigError(answer["problem"])
    return answer


def make_request(
    config: TrainConfig, data: DataDescription, folder: Path, batch_sizes: Sequence[int] = ()
) -> dict[str, Any]:
    """Return what the process that tries a network is told, for `try_network`.

    Raises:
        ConfigError: the network's file is not there.
    """
    file = find_file(config.model, folder)
    sizes = (config.batch_size, *batch_sizes)
    return {
        "reference": config.model,
        "source": None if file is None else file.read_text(encoding="utf-8"),
        "args": dict(config.model_args),
        "dropout": config.dropout,
        "num_classes": data.num_classes,
        "side": data.side,
        "train_size": config.train_size,
        "single": next((size for size in sizes if config.train_size % size == 1), None),
    }


# In the process that tries a network.


def try_network(request: dict[str, Any]) -> dict[str, Any]:
    """Return what `Network` holds and which argument is missing, or the problem as a sentence.

    A network that lacks an argument is not built.
    """
    reference, source = request["reference"], request["source"]
    where = reference.rsplit(":", 1)[0]
    try:
        factory = _import(reference, source)
        text = source if source is not None else _read_source(factory)
        place = _describe_place(factory, where)
        takes_dropout, arguments = read_arguments(factory, place)
        given = dict(request["args"])
        missing = _check_given(given, arguments, place)
        if takes_dropout:
            given["dropout"] = request["dropout"]
        if not missing:
            model = factory(num_classes=request["num_classes"], **given)
            _check_model(model, request, place)
    except ConfigError as exc:
        return {"problem": str(exc)}
    except BaseException as exc:  # the user's code may raise anything
        return {"problem": _describe_exception(exc, where)}
    needs = f"{place}: argument {missing[0]} must be given as model_args." if missing else ""
    found = [argument.__dict__ for argument in arguments]
    return {"source": text, "takes_dropout": takes_dropout, "arguments": found, "missing": needs}


def _import(reference: str, source: str | None) -> Callable[..., Any]:
    where, name = reference.rsplit(":", 1)
    if source is None:
        return _get(importlib.import_module(where), name, reference)
    return _get(_load_text(where, source, digest_source(source)), name, reference)


def _describe_place(factory: Callable[..., Any], where: str) -> str:
    """Return `file:line` of a class or function."""
    try:
        _, line = inspect.getsourcelines(factory)
    except (OSError, TypeError):
        return where
    return f"{where}:{line}"


def _describe_exception(exc: BaseException, where: str) -> str:
    """Return where the user's source raised it, and what."""
    if isinstance(exc, SyntaxError):
        return f"{where}:{exc.lineno}: {exc.msg}."
    frames = traceback.extract_tb(exc.__traceback__)
    ours = [frame.lineno for frame in frames if frame.filename == where]
    line = f":{ours[-1]}" if ours else ""
    text = str(exc).strip().splitlines()
    return f"{where}{line}: {type(exc).__name__}: {text[0] if text else ''}"


def _check_given(given: dict[str, Any], arguments: tuple[Argument, ...], place: str) -> list[str]:
    """Refuse arguments that the constructor does not take; return those that it still needs."""
    known = {argument.name: argument for argument in arguments}
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{place}: the constructor takes no argument {name}.{hint}")
        kind = KINDS[known[name].kind]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            got = f"{type(value).__name__} {value!r}"
            raise ConfigError(f"{place}: argument {name} must be {kind.__name__}, got {got}.")
    return [each.name for each in arguments if each.is_required and each.name not in given]


def _check_model(model: Any, request: dict[str, Any], place: str) -> None:
    """Send two images through the network, in both memory formats."""
    side, num_classes = request["side"], request["num_classes"]
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{place}: it must return an nn.Module, got {type(model).__name__}.")
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, side, side), torch.tensor([0, 1])
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):  # a training has one of the two
        model = model.to(memory_format=layout)
        images = images.contiguous(memory_format=layout)
        for mode in (True, False):
            with torch.set_grad_enabled(mode):
                logits = model.train(mode)(images)
            _check_logits(logits, num_classes, place)
            if mode:
                loss = nn.functional.cross_entropy(logits, labels)
                loss.backward()  # type: ignore[no-untyped-call]
            found.append(logits)
    if all(_are_probabilities(logits) for logits in found):
        rule = "it must return logits, got probabilities (rows that sum to 1)"
        raise ConfigError(f"{place}: {rule}. Leave the softmax out.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise ConfigError(f"{place}: parameter {name} gets no gradient. It is not used.")
    if request["single"] is not None:
        try:
            model.train()(images[:1])
        except ValueError as exc:
            rule = "train_size must leave no last batch of one image, which batch norm refuses"
            got = f"{request['train_size']} in batches of {request['single']}"
            raise ConfigError(f"{place}: {rule}, got {got}. Change one of them.") from exc
    _check_device(model, images, place)


def _check_logits(logits: Any, num_classes: int, place: str) -> None:
    if not isinstance(logits, torch.Tensor):
        raise ConfigError(f"{place}: it must return a tensor, got {type(logits).__name__}.")
    if logits.shape != (2, num_classes) or not logits.is_floating_point():
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise ConfigError(
            f"{place}: logits of 2 images must be float (2, {num_classes}), got {got}."
        )
    if not logits.isfinite().all():
        raise ConfigError(f"{place}: logits must be finite, got nan or inf.")


def _are_probabilities(logits: torch.Tensor) -> bool:
    sums = logits.detach().sum(1)
    return bool((logits >= 0).all() and ((sums - 1).abs() < SUM_TOLERANCE).all())


def _check_device(model: nn.Module, images: torch.Tensor, place: str) -> None:
    """Refuse a network that makes tensors on another device than its images'.

    Everything is moved to torch's meta device, which computes nothing; only an error that names
    both devices counts.
    """
    try:
        with torch.no_grad():
            model.eval().to("meta")(images.to("meta"))
    except Exception as exc:
        text = str(exc)
        if "meta" in text and "cpu" in text:
            rule = "its tensors must be on its images' device"
            raise ConfigError(f"{place}: {rule}, got one that stays on the CPU.") from exc


def main() -> None:
    """Read a request as JSON and write the answer as the last line."""
    answer = try_network(json.loads(sys.stdin.read()))
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
