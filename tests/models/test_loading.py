"""Models that are built first and read afterwards: the same numbers, no more memory than is kept, clear errors."""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForSequenceClassification

from quartet.distributed import sharding
from quartet.distributed.sharding import is_sharded, local_tensor
from quartet.models import loading
from quartet.models.adapters import POLICY, add_adapter
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, create, load_model, read_config, save
from quartet.models.loading import fill, trunk_weights, weights_for
from quartet.models.lora import Lora
from quartet.models.precision import compute_in
from quartet.models.shape import Shape
from quartet.models.skeleton import skeleton
from quartet.training.parallelize import parallelize
from tests.support.world import model, tokenizer

CPU, BF16 = torch.device("cpu"), torch.bfloat16
FOLDER_KINDS = ["llama", "qwen2", "gpt2"]


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """A saved model of the kind that the test asks for, a Llama by default."""
    save(model(getattr(request, "param", "llama")), tokenizer(), tmp_path)
    return tmp_path


def read(folder: Path, prepare: Any = lambda made: made) -> Any:
    made = skeleton(read_config(folder))
    weights = weights_for(made, folder)
    return fill(prepare(made), weights, CPU, folder)


def tensors(made: Any) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in made.state_dict().items()}


@pytest.mark.parametrize("folder", FOLDER_KINDS, indirect=True)
def test_a_skeleton_that_is_filled_is_the_model_to_the_bit(folder):
    whole, made = load_model(folder), read(folder)
    assert not any(p.is_meta for p in made.parameters())
    assert [*tensors(made)] == [*tensors(whole)]
    assert all(torch.equal(t, tensors(whole)[name]) for name, t in tensors(made).items())
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert tied == (made.get_output_embeddings().weight is made.get_input_embeddings().weight)
    ids = torch.arange(4, 12)[None]
    assert torch.equal(made(ids).logits, whole(ids).logits)  # buffers, too


def test_what_is_decided_on_a_skeleton_holds_for_its_weights(folder):
    def prepare(made: Any) -> Any:
        return compute_in(add_adapter(made, Lora(rank=2), POLICY, seed=3), BF16)

    whole, made = prepare(load_model(folder)), read(folder, prepare)
    for (name, mine), (theirs_name, theirs) in zip(
        made.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert name == theirs_name and mine.requires_grad == theirs.requires_grad
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


def test_a_reward_model_and_a_new_head_are_read_alike(folder, tmp_path):
    whole = ScalarModel.from_trunk(load_model(folder), 0, seed=5)
    language_model = skeleton(read_config(folder))
    trunk = trunk_weights(language_model, weights_for(language_model, folder))
    made = ScalarModel.over(language_model.config, 0).fill_trunk(trunk, CPU, folder, seed=5)
    assert all(torch.equal(t, tensors(whole)[name]) for name, t in tensors(made).items())
    whole.centre = 0.25
    whole.save(tmp_path / "reward", tokenizer())
    again = ScalarModel.of_folder(tmp_path / "reward").fill(tmp_path / "reward", CPU)
    assert again.centre == 0.25 and torch.equal(again.head.weight, whole.head.weight)
    assert all(torch.equal(t, tensors(whole)[name]) for name, t in tensors(again).items())


def test_names_that_only_transformers_knows_are_read_through_it(folder):
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    made = read(folder)
    assert all(torch.equal(t, tensors(model())[name]) for name, t in tensors(made).items())


DAMAGES = {
    "missing": (lambda s: s.pop("model.norm.weight"), "has no weights for model.norm.weight"),
    "not finite": (lambda s: s["model.norm.weight"].fill_(torch.nan), "is not finite"),
    "another shape": (lambda s: s.update({"model.norm.weight": torch.ones(3)}), "shape [3]"),
    "unknown": (lambda s: s.update({"model.layers.7.x": torch.ones(3)}), "model.layers.7.x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(folder, damage):
    change, words = DAMAGES[damage]
    made = skeleton(read_config(folder))
    weights = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    change(weights)
    with pytest.raises(ModelError) as error:
        fill(made, weights, CPU, folder)
    assert words in str(error.value) and str(folder) in str(error.value)


# --- memory


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not is_sharded(tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def sixth_of_eight() -> Iterator[Any]:
    """The mesh of eight ranks of which this process is the sixth, and the others are pretended."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        yield init_device_mesh("cpu", (8,))
    finally:
        dist.destroy_process_group()


def test_a_model_in_parts_is_never_whole(tmp_path):
    shape = Shape(type="llama", hidden_size=64, num_layers=4, num_heads=4, max_length=64)
    whole = create(shape, tokenizer(), seed=1)
    save(whole, tokenizer(), tmp_path)
    size = sum(p.numel() for p in whole.parameters()) * 4
    largest = max(p.numel() for p in whole.parameters()) * 4
    with sixth_of_eight() as mesh, Alive() as alive:
        made = skeleton(read_config(tmp_path))
        weights = weights_for(made, tmp_path)
        made = fill(parallelize(made, mesh), weights, CPU, tmp_path)
    kept = sum(local_tensor(p).numel() for p in made.parameters()) * 4
    assert kept < size / 8 + 9 * 64 * 4 + 8 * largest / 8
    assert alive.peak <= 1.2 * kept + largest
    for (name, mine), theirs in zip(made.named_parameters(), whole.parameters(), strict=True):
        rows = theirs.chunk(8)
        own = rows[5] if is_sharded(mine) and len(rows) > 5 else theirs[:0]
        assert torch.equal(local_tensor(mine), own if is_sharded(mine) else theirs), name


def test_rows_come_a_few_at_a_time_and_their_file_is_closed(folder, monkeypatch):
    """What was read of an open file counts as memory of the process."""
    monkeypatch.setattr(sharding, "COPIED_AT_ONCE", 100)
    monkeypatch.setattr(loading, "CHECKED_AT_ONCE", 100)
    sizes, sliced = [], loading.FileRows.__getitem__

    def noted(rows, index):
        read = sliced(rows, index)
        sizes.append((read.numel(), len(read)))
        return read

    monkeypatch.setattr(loading.FileRows, "__getitem__", noted)
    made = skeleton(read_config(folder))
    weights = weights_for(made, folder)
    with Alive() as alive:
        made = fill(made, weights, CPU, folder)
    assert len(sizes) > 50 and all(size <= 100 or rows == 1 for size, rows in sizes)
    kept, largest = (4 * reduce(p.numel() for p in made.parameters()) for reduce in (sum, max))
    # A slice counts with its whole tensor here, of which it touches its own rows only.
    assert kept <= alive.peak <= kept + largest + 100 * 8
    if sys.platform == "linux":
        assert str(folder) not in Path("/proc/self/maps").read_text()
    whole = load_model(folder).state_dict()
    assert all(torch.equal(t, whole[name]) for name, t in tensors(made).items())
    assert weights["model.norm.weight"][:].shape == made.model.norm.weight.shape


def test_a_classifier_of_another_library_is_read_in_parts(tmp_path):
    config = model().config
    config.num_labels = 1
    theirs = AutoModelForSequenceClassification.from_config(config)
    theirs.save_pretrained(tmp_path)
    scalar = ScalarModel.of_folder(tmp_path)
    with sixth_of_eight() as mesh:
        parallelize(scalar.model, mesh)
        scalar.fill(tmp_path, CPU)
    assert torch.equal(scalar.head.weight, theirs.score.weight)
    own = local_tensor(scalar.model.base_model.embed_tokens._parameters["weight"])
    assert torch.equal(own, theirs.model.embed_tokens.weight.detach().chunk(8)[5])
