"""A network of the user's own: its check, its source, its arguments."""

from __future__ import annotations

import copy
import json
import random
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.builders import SHAPES, make_config
from tune_cifar.data.load import load_train_val
from tune_cifar.dataset import CIFAR10
from tune_cifar.errors import CheckpointError, ConfigError
from tune_cifar.models.build import build_model
from tune_cifar.models.custom import (
    Argument,
    add_source,
    check_network,
    digest_source,
    load_factory,
    make_request,
    read_arguments,
    try_network,
)
from tune_cifar.models.summary import describe_model
from tune_cifar.schema import Numerics, TrainConfig
from tune_cifar.search.disk import estimate_disk_needs
from tune_cifar.space.reader import parse_space
from tune_cifar.space.select import SearchSpace, select_tier
from tune_cifar.space.template import make_space_text
from tune_cifar.train import step as step_module
from tune_cifar.train.checkpoint import (
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from tune_cifar.train.network import choose_execution, resolve_network
from tune_cifar.train.step import build_initial_model
from tune_cifar.train.trainer import Trainer
from tune_cifar.train.trial import WEIGHTS, train_trial
from tune_cifar.verify.export import load_network, write_safetensors

HEAD = """
import random

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes: int, dropout: float = 0.0, width: int = 8, deep: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=4)
        self.drop = nn.Dropout(dropout)
        self.more = nn.Conv2d(width, width, 1) if deep else nn.Identity()
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.drop(self.more(self.conv(images).relu())).mean((2, 3)))
"""
# Each adds a class Bad to the file; and what is said of it.
BAD = {
    "softmax": (
        "def forward(self, x): return super().forward(x).softmax(1)",
        "it must return logits, got probabilities (rows that sum to 1). Leave the softmax out.",
    ),
    "shape": (
        "def forward(self, x): return super().forward(x)[:, :4]",
        "logits of 2 images must be float (2, 10), got torch.float32 (2, 4).",
    ),
    "no tensor": (
        "def forward(self, x): return [super().forward(x)]",
        "it must return a tensor, got list.",
    ),
    "nan": (
        "def forward(self, x): return super().forward(x) / 0",
        "logits must be finite, got nan or inf.",
    ),
    "device": (
        "def forward(self, x): return super().forward(x) + torch.zeros(10)",
        "its tensors must be on its images' device, got one that stays on the CPU.",
    ),
}


def write(folder: Path, more: str = "", name: str = "net.py") -> Path:
    path = folder / name
    path.write_text(HEAD + textwrap.dedent(more))
    return path


def make_own(name: str = "Net", **changes: Any) -> TrainConfig:
    return make_config(model=f"net.py:{name}", **changes)


def refuse(folder: Path, config: TrainConfig) -> str:
    """The problem that check_network's process finds, found in this one."""
    answer = try_network(make_request(config, CIFAR10, folder))
    return str(answer.get("problem") or answer["missing"])


def refuse_in_a_process(folder: Path, config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_network(config, CIFAR10, folder)
    return str(caught.value)


def find_line(path: Path, text: str) -> int:
    lines = path.read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


def test_a_sound_network_is_described_by_its_constructor(tmp_path: Path) -> None:
    path = write(tmp_path)
    found = check_network(make_own(model_args={"width": 12}), CIFAR10, tmp_path)
    assert found.takes_dropout and found.source == path.read_text()
    assert found.digest == digest_source(found.source)
    assert found.arguments == (Argument("width", "int", 8), Argument("deep", "bool", False))


@pytest.mark.parametrize("case", BAD)
def test_a_network_that_would_waste_a_search_is_refused_with_file_and_line(
    case: str, tmp_path: Path
) -> None:
    forward, rule = BAD[case]
    path = write(tmp_path, f"\nclass Bad(Net):\n    {forward}\n")
    line = find_line(path, "class Bad")
    assert refuse(tmp_path, make_own("Bad")) == f"net.py:{line}: {rule}"


def test_what_its_code_raises_is_told_with_the_line_that_raised_it(tmp_path: Path) -> None:
    path = write(tmp_path, "\nclass Bad(Net):\n    def forward(self, x):\n        return x.nope\n")
    line = find_line(path, "x.nope")
    sentence = refuse(tmp_path, make_own("Bad"))
    assert sentence.startswith(f"net.py:{line}: AttributeError: ")
    path.write_text("class Net(:\n")
    assert refuse(tmp_path, make_own()) == "net.py:1: invalid syntax."


@pytest.mark.slow
def test_a_problem_comes_from_the_process_that_tried_it_and_so_does_its_end(tmp_path: Path) -> None:
    path = write(tmp_path)
    unknown = make_own(model_args={"widht": 8})
    assert "takes no argument widht" in refuse_in_a_process(tmp_path, unknown)
    path.write_text("import os\nos._exit(3)\n")
    sentence = refuse_in_a_process(tmp_path, make_own())
    assert "the process that tried it ended with status 3" in sentence


def test_an_unused_parameter_and_a_batch_of_one_are_refused(tmp_path: Path) -> None:
    more = """
    class Unused(Net):
        def __init__(self, num_classes: int):
            super().__init__(num_classes)
            self.spare = nn.Linear(2, 2)


    class Normed(Net):
        def __init__(self, num_classes: int):
            super().__init__(num_classes)
            self.norm = nn.BatchNorm1d(num_classes)

        def forward(self, images):
            return self.norm(super().forward(images))
    """
    write(tmp_path, more)
    assert "parameter spare.weight gets no gradient" in refuse(tmp_path, make_own("Unused"))
    single = make_own("Normed", train_size=61, batch_size=20)
    assert "must leave no last batch of one image" in refuse(tmp_path, single)
    whole = make_own("Normed", train_size=60, batch_size=20)
    assert "problem" not in try_network(make_request(whole, CIFAR10, tmp_path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    sentence = refuse_in_a_process(tmp_path, make_own())
    assert sentence == f"model: the file of Net must be there, got no {tmp_path}/net.py or net.py."


def test_arguments_must_fit_the_constructor(tmp_path: Path) -> None:
    write(tmp_path, "\nclass Needs(Net):\n    def __init__(self, num_classes, size: int): ...\n")
    unknown = make_own(model_args={"widht": 8})
    assert "takes no argument widht. Did you mean width?" in refuse(tmp_path, unknown)
    wrong = make_own(model_args={"width": 8.5})
    assert "argument width must be int, got float 8.5" in refuse(tmp_path, wrong)
    assert "argument size must be given as model_args" in refuse(tmp_path, make_own("Needs"))


def test_a_file_is_tried_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when its text has changed; a process has no time then."""
    needs = "\nclass Needs(Net):\n    def __init__(self, num_classes, size: int): ...\n"
    path = write(tmp_path, needs)
    found = check_network(make_own("Needs"), CIFAR10, tmp_path, needs_all=False)
    assert found.arguments == (Argument("size", "int", None, is_required=True),)
    monkeypatch.setattr("tune_cifar.models.custom.CHECK_SECONDS", 0.0)
    assert check_network(make_own("Needs"), CIFAR10, tmp_path, needs_all=False) == found
    line = find_line(path, "class Needs")
    rule = f"net.py:{line}: argument size must be given as model_args."
    assert refuse_in_a_process(tmp_path, make_own("Needs")) == rule
    write(tmp_path, f"{needs}# changed\n")
    assert "must go through it in 0 s" in refuse_in_a_process(tmp_path, make_own("Needs"))


def test_a_constructor_is_read_without_calling_it() -> None:
    def make(num_classes: int, width: int, scale=1.5, kind: str = "a", layer=torch.nn.ReLU): ...  # type: ignore[no-untyped-def]

    takes_dropout, arguments = read_arguments(make, "x.py:1")
    assert not takes_dropout
    assert [(each.name, each.kind, each.default) for each in arguments] == [
        ("width", "int", None),
        ("scale", "float", 1.5),
        ("kind", "str", "a"),
    ]
    with pytest.raises(ConfigError, match=r"^x.py:1: the constructor must take num_classes"):
        read_arguments(lambda width: None, "x.py:1")


def test_sources_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    texts = [HEAD, HEAD.replace("width: int = 8", "width: int = 16")]
    models = []
    for text in [*texts, *texts]:
        config = make_own(model_digest=add_source(text))
        model: Any = build_model(config)
        models.append(model.conv.out_channels)
    assert models == [8, 16, 8, 16]
    with pytest.raises(ConfigError, match=r"source of net.py:Net .* is not known here"):
        build_model(make_own(model_digest="0" * 16))


def test_an_installed_package_must_be_the_recorded_one() -> None:
    reference = "torchvision.models:resnet18"
    with pytest.raises(ConfigError, match="must be the recorded one, 0000"):
        load_factory(reference, "0" * 16)
    digest = digest_source(Path(torch_source()).read_text())
    assert load_factory(reference, digest).__name__ == "resnet18"


def torch_source() -> str:
    from torchvision.models import resnet

    return str(resnet.__file__)


def test_arguments_and_source_are_part_of_the_fingerprint() -> None:
    plain = make_own(model_args={"width": 8}, model_digest="a")
    assert make_own(model_args={"width": 9}, model_digest="a").fingerprint != plain.fingerprint
    assert make_own(model_args={"width": 8}, model_digest="b").fingerprint != plain.fingerprint
    again = TrainConfig(**plain.model_dump(mode="json"))
    assert again == plain and again.get("model_args.width") == 8
    named = TrainConfig(**{**plain.model_dump(), "model_args.width": 9, "model_args.deep": True})
    assert named.model_args == (("deep", True), ("width", 9))


def make_space(tmp_path: Path, search: str = "", baseline: str = "") -> SearchSpace:
    """A space of net.py, with more lines."""
    arguments = [("width", "int", 8), ("deep", "bool", False)]
    text = make_space_text("net.py:Net", "net", True, arguments)
    text = text.replace("search:\n", f"search:\n{search}").replace("    width: 8\n", baseline)
    (tmp_path / "net.yaml").write_text(text)
    return select_tier(parse_space(text, tmp_path / "net.yaml"), "full")


WIDTH = "  model_args.width: {low: 4, high: 16, step: 4}\n"


def test_an_argument_is_searched_like_any_other_hyperparameter(tmp_path: Path) -> None:
    write(tmp_path)
    search = f"{WIDTH}  model_args.deep: {{choices: [false, true]}}\n"
    space = make_space(tmp_path, search, "    width: 8\n")
    assert space.baseline_params["model_args.width"] == 8
    config = space.config({"model_args.width": 12, "model_args.deep": True, "max_lr": 0.2})
    assert config.arguments == {"model_args.deep": True, "model_args.width": 12}
    resolved = resolve_network(space, CIFAR10)
    assert resolved.model_source == HEAD
    assert resolved.baseline.model_digest == digest_source(HEAD)
    assert resolve_network(resolved, CIFAR10) is resolved
    assert choose_execution(space.baseline, "auto") == "eager"
    with pytest.raises(ConfigError, match="`execution` must be eager for a network of your own"):
        choose_execution(space.baseline, "captured")


@pytest.mark.slow
def test_a_space_must_fit_the_constructor(tmp_path: Path) -> None:
    write(tmp_path, "\ndef make(num_classes: int, width: float = 8.0): return Net(num_classes)\n")
    space = make_space(tmp_path, WIDTH, "    width: 8\n")
    plain = space.baseline.model_copy(update={"model": "net.py:make", "model_args": ()})
    with pytest.raises(ConfigError, match="dropout must be 0 and not searched"):
        resolve_network(replace(space, baseline=plain), CIFAR10)


def test_layers_are_shown_and_a_receptive_field_where_it_is_known(
    workplace: Path,
) -> None:
    write(workplace)
    summary = describe_model("net.py:Net")
    assert summary.layers[0].receptive_field == 3 and summary.receptive_field is None
    assert summary.params == 3 * 8 * 9 + 8 + 8 * 10 + 10
    with pytest.raises(ConfigError, match="must be there"):
        describe_model("none.py:Net")


DRAWING = """
class Drawing(Net):
    def forward(self, images):
        if self.training:
            images = images * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        return super().forward(images)
"""


def test_global_generators_make_no_training_depend_on_another(
    fp32: Numerics, tmp_path: Path
) -> None:
    """torch's Dropout, numpy and Python's random: bitwise, also from a checkpoint."""
    digest = add_source(HEAD + DRAWING)
    config = make_own("Drawing", model_digest=digest, dropout=0.3, epochs=3)
    data = load_train_val(SHAPES, config.train_size, config.val_size)

    def curve(trainer: Trainer) -> list[tuple[float, float | None]]:
        return [(result.train_loss, result.val_loss) for result in trainer]

    whole = curve(Trainer(config, data, fp32))
    torch.rand(5)
    interrupted, other = Trainer(config, data, fp32), Trainer(config, data, fp32)
    next(iter(interrupted))
    assert curve(other) == whole
    save_checkpoint(tmp_path / "checkpoint-0001.pt", interrupted.state_dict())
    resumed = Trainer(config, data, fp32)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint-0001.pt"))
    assert curve(resumed) == whole[1:]
    before = torch.get_rng_state()
    next(iter(Trainer(config, data, fp32)))
    assert torch.equal(before, torch.get_rng_state())


def test_an_exported_file_runs_no_source_of_its_own_unasked(tmp_path: Path) -> None:
    text = f"{HEAD}\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
    config = make_own(model_digest=digest_source(text))
    weights = {"head.bias": torch.zeros(10)}
    names = list(CIFAR10.class_names)
    metadata = {"config": config.model_dump_json(), "classes": json.dumps(names)}
    metadata |= {"mean": "[0.5, 0.5, 0.5]", "std": "[1, 1, 1]", "model_source": text}
    save_weights(tmp_path / "net.safetensors", weights, metadata)
    with pytest.raises(ConfigError, match="is not known here"):
        load_network(tmp_path / "net.safetensors")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError):  # its weights are not all there
        load_network(tmp_path / "net.safetensors", run_source=True)
    assert (tmp_path / "ran").exists()


VALUES = """
SCALE = torch.ones(3, 1, 1)  # made when the file is loaded


class Asks(Net):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]

    def forward(self, images):
        return super().forward(images * SCALE)
"""


def test_a_network_whose_code_needs_values_is_measured_and_then_trained(
    workplace: Path, fp32: Numerics
) -> None:
    """Neither its constructor nor its file runs on torch's meta device."""
    path = write(workplace, VALUES)
    digest = add_source(path.read_text())
    space = make_space(workplace, baseline="    width: 8\n")
    config = make_own("Asks", model_digest=digest, epochs=1)
    torch_state = torch.get_rng_state()
    needs = estimate_disk_needs(replace(space, baseline=config), 1, 1)
    assert torch.equal(torch_state, torch.get_rng_state())
    plain = make_own(model_digest=digest)
    assert needs == estimate_disk_needs(replace(space, baseline=plain), 1, 1)
    loaded: Any = load_factory("net.py:Asks", digest)
    assert loaded.forward.__globals__["SCALE"].device.type == "cpu"
    data = load_train_val(SHAPES, config.train_size, config.val_size)
    assert len(list(Trainer(config, data, fp32))) == 1
    assert describe_model("net.py:Asks").params == 3 * 8 * 9 + 8 + 8 * 10 + 10


DRAWN = """
FIRST = random.random(), np.random.rand(), torch.rand(1)


class Drawn(Net):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.order = np.random.permutation(1000).tolist()
        self.number = random.random()
"""


def test_a_constructor_draws_the_same_from_every_global_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where its file draws something when it is loaded, once in a process."""
    config = make_own("Drawn", model_digest=add_source(HEAD + DRAWN))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    models: list[Any] = []
    for _ in range(2):
        monkeypatch.setattr(step_module, "_drawn", {})
        models.append(build_initial_model(config))
    monkeypatch.setattr(step_module, "_drawn", {})
    other: Any = build_initial_model(config.model_copy(update={"seed": 1}))
    first, again = models
    assert (first.order, first.number) == (again.order, again.number)
    assert torch.equal(first.head.weight, again.head.weight)
    assert first.order != other.order and first.number != other.number
    assert random.getstate() == before[0]
    assert all(map(np.array_equal, np.random.get_state(), before[1]))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_sweep_of_learning_rates_draws_as_a_training_does(fp32: Numerics) -> None:
    config = make_own("Drawing", model_digest=add_source(HEAD + DRAWING), dropout=0.3)
    config = config.model_copy(update={"schedule": "constant", "max_lr": 0.02})
    data = load_train_val(SHAPES, config.train_size, config.val_size)
    trained, swept = Trainer(config, data, fp32), Trainer(config, data, fp32)
    next(iter(trained))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    for _ in swept.sweep([0.02] * config.num_steps_per_epoch):
        torch.rand(1)
    assert random.getstate() == python_state
    assert all(map(np.array_equal, np.random.get_state(), numpy_state))
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, swept.model.state_dict()[name])


TIED = """
class Tied(Net):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        act = nn.PReLU()
        self.first, self.second = act, act

    def forward(self, images):
        return self.head(self.second(self.conv(self.first(images))).mean((2, 3)))
"""


def test_a_network_with_tied_weights_is_kept_and_exported(fp32: Numerics, tmp_path: Path) -> None:
    text = HEAD + TIED
    config = make_own("Tied", model_digest=add_source(text), epochs=1)
    data = load_train_val(SHAPES, config.train_size, config.val_size)
    trainers: list[Trainer] = []
    folder = tmp_path / "search" / "trials" / "0"
    list(train_trial(config, data, fp32, folder, on_trainer=trainers.append))
    state = trainers[0].model.state_dict()
    kept = load_weights(folder / WEIGHTS)
    assert {*kept} == {*state} and {"first.weight", "second.weight"} <= {*kept}
    assert all(torch.equal(kept[name], weight) for name, weight in state.items())
    metadata = {"config": config.model_dump_json(), "classes": json.dumps(data.about.class_names)}
    metadata |= {"mean": json.dumps(data.about.mean), "std": json.dumps(data.about.std)}
    write_safetensors(tmp_path / "net.safetensors", trainers[0].model, metadata, data.about)
    network = load_network(tmp_path / "net.safetensors").network
    assert all(torch.equal(network.state_dict()[name], weight) for name, weight in state.items())


FLAT = """
class Flat(Net):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.head = nn.Linear(8 * 8 * 8, num_classes)

    def forward(self, x):
        x = self.conv(x)
        x = SHAPED
        return self.head(x)
"""


@pytest.mark.parametrize(
    ("shaped", "is_sound"),
    [
        ("x.view(x.size(0), -1)", False),  # what channels_last has not
        ("x.permute(0, 2, 3, 1).view(x.size(0), -1)", False),  # what contiguous has not
        ("x.flatten(1)", True),
    ],
)
def test_a_network_must_run_in_both_memory_formats(
    shaped: str, is_sound: bool, tmp_path: Path
) -> None:
    path = write(tmp_path, FLAT.replace("SHAPED", shaped))
    line = find_line(path, f"x = {shaped}")
    problem = try_network(make_request(make_own("Flat"), CIFAR10, tmp_path)).get("problem")
    if is_sound:
        assert problem is None
    else:
        assert problem.startswith(f"net.py:{line}: RuntimeError: view size is not compatible")


def test_what_a_constructor_computes_of_its_parameters_lasts_for_one_step(tmp_path: Path) -> None:
    more = """
    class Once(Net):
        def __init__(self, num_classes: int):
            super().__init__(num_classes)
            self.power = nn.Parameter(torch.tensor(0.0))
            self.scale = self.power.exp()

        def forward(self, images):
            return super().forward(images) * self.scale
    """
    write(tmp_path, more)
    assert "backward through the graph a second time" in refuse(tmp_path, make_own("Once"))


NORMED = """
class Normed(Net):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(self.head)
"""


def test_a_network_that_cannot_be_copied_is_built_for_each_training(
    fp32: Numerics, tmp_path: Path
) -> None:
    text = f"import warnings\n{HEAD}{NORMED}"
    (tmp_path / "net.py").write_text(text)
    assert "problem" not in try_network(make_request(make_own("Normed"), CIFAR10, tmp_path))
    config = make_own("Normed", model_digest=add_source(text), ema_decay=0.9, epochs=2)
    data = load_train_val(SHAPES, config.train_size, config.val_size)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(build_initial_model(config))
    first, second = ([found.val_loss for found in Trainer(config, data, fp32)] for _ in range(2))
    assert first == second and len(first) == 2


def test_every_batch_size_that_would_be_tried_is_checked(tmp_path: Path) -> None:
    """The choices, or the ends of a range."""
    more = """
    class Normed(Net):
        def __init__(self, num_classes: int, width: int = 8, deep: bool = False):
            super().__init__(num_classes)
            self.norm = nn.BatchNorm1d(num_classes)

        def forward(self, images):
            return self.norm(super().forward(images))
    """
    write(tmp_path, more)
    space = make_space(tmp_path, baseline="    width: 8\n")
    baseline = space.baseline.model_copy(
        update={"model": "net.py:Normed", "train_size": 1025, "batch_size": 100}
    )
    space = replace(space, baseline=baseline)
    assert make_request(baseline, CIFAR10, tmp_path)["single"] is None
    with pytest.raises(ConfigError, match=r"got 1025 in batches of 64\. Change one of them\."):
        resolve_network(space, CIFAR10)


def test_an_argument_whose_default_is_none_need_not_be_given(tmp_path: Path) -> None:
    more = """
    class Maybe(Net):
        def __init__(self, num_classes: int, size: int = None):
            super().__init__(num_classes, width=size or 8)
    """
    write(tmp_path, more)
    for arguments in ({}, {"size": 4}):
        config = make_own("Maybe", model_args=arguments)
        answer = try_network(make_request(config, CIFAR10, tmp_path))
        assert "problem" not in answer and not answer["missing"]


TOKENS = """
class Tokens(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.mix = nn.Linear(6, 5)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(20, num_classes)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = self.mix(x).transpose(1, 2).unflatten(2, (8, 8))
        return self.head(self.flat(self.pool(x)))


class Pooled(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        self.head = nn.Linear(20, num_classes)

    def forward(self, images):
        return self.head(self.flat(self.pool(self.conv(images))))


class Last(Pooled):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.pool, self.head = nn.AvgPool2d(8), nn.Linear(5, num_classes)
"""


def test_a_linear_layer_counts_on_every_token(workplace: Path) -> None:
    write(workplace, TOKENS)
    macs = {row.name: row.macs for row in describe_model("net.py:Tokens").layers}
    assert macs["mix"] == 6 * 5 * 64 and macs["head"] == 20 * 10
    assert macs["embed"] == 3 * 6 * 16 * 64


def test_a_receptive_field_is_unknown_behind_a_pooling_without_a_window(workplace: Path) -> None:
    """And behind what mixes positions; a Flatten of one position leaves it known."""
    write(workplace, TOKENS)
    fields = [row.receptive_field for row in describe_model("net.py:Pooled").layers]
    assert fields == [4, None, None, None]
    fields = [row.receptive_field for row in describe_model("net.py:Last").layers]
    assert fields == [4, 32, 32, 32]
