"""Muon, checked against answers that are known, and against PyTorch's own for matrices."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import TINY, paint, refused
from torch import Tensor, nn

from machinery import optimizers
from machinery.optimizers import Muon, hidden_names, moments_of, orthogonalize
from modules import UNet

pytestmark = pytest.mark.quick
LR = 0.01


def small_network() -> UNet:
    torch.manual_seed(0)
    return UNet(img_size=(8, 8), channels=3, width=16, multipliers=(1, 2), blocks=1, classes=2)


class Layers(nn.Module):
    """A first layer, a convolution, two matrices (wide, tall), and a bias of each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
        self.wide, self.tall = nn.Linear(9, 4), nn.Linear(4, 9)


def with_gradients(network: nn.Module, number: int) -> None:
    torch.manual_seed(number)
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)


# ---- the iteration -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(16, 40), (40, 16), (24, 24), (1, 9)])
def test_singular_values_come_near_one_and_directions_stay(rows, columns):
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.logspace(0, -2, values.shape[1], dtype=torch.float64).expand_as(values)
    found = orthogonalize(left * values[:, None] @ right)
    turned = left.mT @ found @ right.mT  # diagonal, where no direction has changed
    diagonal = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(diagonal)).abs().max() < 1e-6
    assert 0.6 < diagonal.min() <= diagonal.max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 9)), torch.zeros(1, 4, 9))


def test_how_large_a_gradient_is_changes_nothing():
    torch.manual_seed(0)
    matrix = torch.randn(1, 8, 20, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(1e4 * matrix), orthogonalize(matrix))


# ---- the optimizer -------------------------------------------------------------------------------


def test_first_and_last_layers_embeddings_norms_and_biases_are_left_to_adamw():
    network = small_network()
    hidden = hidden_names(network)
    others = {name for name, _ in network.named_parameters()} - set(hidden)
    assert {name for name in others if not name.endswith("bias") and "norm" not in name} == {
        "conv_in.weight",
        "conv_out.weight",
        "time_embedding.linear_1.weight",
        "time_embedding.linear_2.weight",
        "class_embedding.weight",
    }
    assert "down_blocks.0.resnets.0.conv1.weight" in hidden
    assert "mid_block.attentions.0.to_q.weight" in hidden


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_it_is_pytorchs_muon_for_matrices_and_pytorchs_adamw_for_the_rest(precision):
    """PyTorch's computes in bfloat16: in float32 ours is near it, not the same."""
    ours, theirs = Layers(), Layers()
    optimizer = Muon(ours, precision)
    rest = [weight for name, weight in theirs.named_parameters() if "bias" in name or "in" in name]
    adamw = torch.optim.AdamW(rest, lr=LR, weight_decay=0.0, fused=True)
    layers = (theirs.conv, theirs.wide, theirs.tall)
    matrices = [nn.Parameter(layer.weight.detach().flatten(1).clone()) for layer in layers]
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(matrices, lr=LR, **options)
    optimizer.lr = LR
    for number in range(5):
        with_gradients(ours, number)
        with_gradients(theirs, number)
        for matrix, layer in zip(matrices, layers, strict=True):
            matrix.grad = layer.weight.grad.flatten(1)
        for each in (optimizer, adamw, muon):
            each.step()
    tolerance = 5e-4 if precision == torch.bfloat16 else 5e-3  # of weights that moved by 5e-2
    for matrix, layer in zip(matrices, (ours.conv, ours.wide, ours.tall), strict=True):
        assert (matrix - layer.weight.flatten(1)).abs().max() < tolerance
    for name, weight in theirs.named_parameters():
        if "bias" in name or "in" in name:
            assert torch.equal(weight, ours.get_parameter(name)), name


def test_adamw_is_pytorchs():
    """To the bit."""
    ours, theirs = small_network(), small_network()
    optimizer = optimizers.AdamW(ours, torch.float32)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.0, fused=True)
    optimizer.lr = LR
    for number in range(5):
        for network, each in ((ours, optimizer), (theirs, adamw)):
            with_gradients(network, number)
            each.step()
    for name, weight in theirs.named_parameters():
        assert torch.equal(weight, ours.get_parameter(name)), name


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_copy_of_network_and_optimizer_goes_the_same_way(name):
    network = small_network()
    optimizer = optimizers.OPTIMIZERS[name](network, torch.float32)
    optimizer.lr = LR
    with_gradients(network, 0)
    optimizer.step()
    copied, its_optimizer = copy.deepcopy((network, optimizer))
    kept = copy.deepcopy(network.state_dict())
    with_gradients(copied, 1)
    its_optimizer.step()
    assert all(torch.equal(weight, kept[key]) for key, weight in network.state_dict().items())
    with_gradients(network, 1)
    optimizer.step()
    for key, weight in network.state_dict().items():
        assert torch.equal(weight, copied.state_dict()[key]), key


def test_a_step_is_as_long_as_one_of_adamw():
    """So that one learning rate serves both."""
    lengths = {}
    for name, make in optimizers.OPTIMIZERS.items():
        network = small_network()
        before = {key: weight.clone() for key, weight in network.named_parameters()}
        optimizer = make(network, torch.float32)
        optimizer.lr = LR
        for number in range(20):
            with_gradients(network, number)
            optimizer.step()
        hidden = [network.get_parameter(key) - before[key] for key in hidden_names(network)]
        lengths[name] = torch.cat([change.flatten() for change in hidden]).square().mean().sqrt()
    assert 0.4 < lengths["muon"] / lengths["adamw"] < 2.5


def test_processes_agree_on_what_they_add_up(monkeypatch):
    """On a machine with bfloat16, beside one without."""
    asked, orthogonalize = [], optimizers.orthogonalize

    def note(matrices: Tensor) -> Tensor:
        asked.append(matrices.dtype)
        return orthogonalize(matrices)

    monkeypatch.setattr(optimizers, "orthogonalize", note)
    short, whole, half = torch.bfloat16, torch.float32, torch.float16
    cases = ((short, 0.0, short), (short, 1.0, whole), (whole, 0.0, whole), (half, 0.0, whole))
    for precision, others, expected in cases:
        monkeypatch.setattr(
            optimizers.processes, "largest", lambda number, others=others: (max(number, others),)
        )
        network = Layers()
        optimizer = Muon(network, precision)
        with_gradients(network, 0)
        optimizer.step()
        assert set(asked) == {expected}
        asked.clear()


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_what_is_kept_of_each_weight_is_what_a_checkpoint_must_have(optimizer):
    network = small_network()
    made = optimizers.OPTIMIZERS[optimizer](network, torch.float32)
    with_gradients(network, 0)
    made.step()
    state = made.state_dict()["state"]
    found = [{name: each.shape for name, each in state[number].items()} for number in sorted(state)]
    assert found == moments_of(network, optimizer)


def test_a_skipped_step_changes_nothing():
    """A gradient that was infinite in float16: the loss scaler says so on the device."""
    network = Layers()
    optimizer = Muon(network, torch.float16)
    with_gradients(network, 0)
    optimizer.step()
    kept = {name: weight.clone() for name, weight in network.named_parameters()}
    state = copy.deepcopy(optimizer.moments)
    with_gradients(network, 1)
    for weight in network.parameters():
        weight.grad.flatten()[0] = torch.inf
    network.conv.weight.grad[0, 0, 0, 0] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for name, weight in network.named_parameters():
        assert torch.equal(weight, kept[name]), name
    for before, after in zip(state, optimizer.moments, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)


# ---- in a training -------------------------------------------------------------------------------


CHECKPOINT = Path("models/run/checkpoint.pt")


@pytest.fixture
def train(place, run):
    paint(place / "pictures", 4)

    def run_words(*words: str, run_name: str = "run"):
        return run("train", "--dataset=pictures", f"--run_name={run_name}", *TINY, *words)

    return run_words


def test_a_run_goes_on_with_what_it_began_with(train):
    """That of an earlier version, which kept no such setting, with AdamW."""
    assert train("--epochs=1", "--optimizer=adamw").status == 0
    state = torch.load(CHECKPOINT, weights_only=True)
    assert all("exp_avg_sq" in moments for moments in state["optimizer"]["state"].values())
    del state["settings"]["optimizer"]
    torch.save(state, CHECKPOINT)
    assert train("--epochs=2").status == 0
    assert torch.load(CHECKPOINT, weights_only=True)["settings"]["optimizer"] == "adamw"
    line = refused(train("--epochs=3", "--optimizer=muon"))
    assert "--optimizer was adamw, is now muon" in line


def test_a_new_run_has_muon_also_if_it_begins_from_one_that_had_not(train):
    assert train("--epochs=1", "--optimizer=adamw", run_name="before").status == 0
    assert train("--epochs=1", "--init_from=before").status == 0
    state = torch.load(CHECKPOINT, weights_only=True)
    assert state["settings"]["optimizer"] == "muon"
    assert {len(moments) for moments in state["optimizer"]["state"].values()} == {2, 3}
