"""Which steps suit a run: the search, what `sample` makes of them, and distillation."""

import itertools
import math
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, paint, refused
from PIL import Image
from torch import Tensor, nn

import ddpm
import tools.distill
import tools.evaluate
import tools.play_images
import tools.steps
from ddpm import Diffusion
from machinery import checkpoints, command_line
from machinery.basics import noise_of
from machinery.steps import AUTO, SPACINGS, Way, are_paths, by_number, choose, kept, suited
from tools.steps import Walks, missed_by, misses, search

NOISE_STEPS = 60
TRAIN = ("train", "--dataset=pictures", "--run_name=run", f"--noise_steps={NOISE_STEPS}")
TRAIN += (*(word for word in TINY if not word.startswith("--lr=")), "--lr=0.01")
DEVICE = "--device=cpu"

# ---- the search ----------------------------------------------------------------------------------


def test_search_finds_what_trying_all_paths_finds():
    """Of 9 places in 4 steps: 35 paths."""
    rng = np.random.default_rng(0)
    missed = rng.random((9, 9, 9))
    paths = [(0, *between, 8) for between in itertools.combinations(range(1, 8), 3)]
    for before, here, there in itertools.product(range(9), repeat=3):
        if not (before < here < there or before == here == 0 < there):
            missed[before, here, there] = math.inf
    best = min(paths, key=lambda path: missed_by(missed, path))
    assert search(missed, 4) == list(best)
    assert missed_by(missed, search(missed, 4)) < math.inf


def exact_walks(diffusion: Diffusion, places: list[int], spread: Tensor) -> Walks:
    """Data of N(0, spread^2) in each of D values: its way out of the noise is known exactly."""
    torch.manual_seed(0)
    z = torch.randn(16, len(spread))  # (N, D)
    alpha_bar = diffusion.alpha_bar[places, None, None]
    spreads = (alpha_bar * spread**2 + 1 - alpha_bar).sqrt()  # of x_t (P, 1, D)
    x_t = spreads * z
    return Walks(places, x_t, alpha_bar.sqrt() * spread**2 / spreads**2 * x_t)


def test_misses_are_those_of_the_sampler():
    """What the products say is what `denoise` does: its first step, and one that knows another."""
    diffusion = Diffusion(1000, "cosine")
    places = [1000, 900, 700, 400, 40]
    walks = exact_walks(diffusion, places, torch.linspace(0.1, 3, 7, dtype=torch.float64))
    missed = misses(walks, diffusion.alpha_bar)
    guesses = dict(zip(places, walks.x_0, strict=True))
    states = dict(zip(places, walks.x_t, strict=True))

    def miss(path: list[int]) -> float:
        """Of the last step, all before it being exact."""
        walk = diffusion.denoise(lambda x_t, t: guesses[t], states[path[0]], path, "dpm++")
        *_, (x_t, _) = walk
        if len(path) == 3:  # what the first step got wrong is put right
            first = next(diffusion.denoise(lambda _, t: guesses[t], states[path[0]], path, "dpm++"))
            kept_noise = (1 - diffusion.alpha_bar[path[2]]) / (1 - diffusion.alpha_bar[path[1]])
            x_t = x_t + kept_noise.sqrt() * (states[path[1]] - first[0])
        weight = diffusion.alpha_bar[path[-1]].sqrt()
        return ((x_t - states[path[-1]]).square().mean() / weight).item()

    assert abs(missed[0, 0, 2] - miss([1000, 700])) < 1e-9
    assert abs(missed[0, 1, 3] - miss([1000, 900, 400])) < 1e-9
    assert abs(missed[1, 2, 4] - miss([900, 700, 40])) < 1e-9
    assert missed[2, 1, 4] == missed[1, 1, 3] == math.inf


def test_found_steps_end_nearer_to_the_exact_image_than_others():
    """Of data of a spread of 0.3."""
    diffusion = Diffusion(1000, "cosine")
    spread = torch.full((64,), 0.3, dtype=torch.float64)
    places = np.linspace(1000, 40, 49).round().astype(int).tolist()
    walks = exact_walks(diffusion, places, spread)
    missed = misses(walks, diffusion.alpha_bar)

    def predict_clean(x_t: Tensor, t: int) -> Tensor:
        alpha_bar = diffusion.alpha_bar[t]
        return alpha_bar.sqrt() * 0.09 / (alpha_bar * 0.09 + 1 - alpha_bar) * x_t

    def error(path: list[int]) -> float:
        """At t = 40: the last leap is the same for all."""
        *_, (x_t, _) = diffusion.denoise(predict_clean, walks.x_t[0], path[:-1], "dpm++")
        return (x_t - walks.x_t[-1]).abs().mean().item()

    for steps in (5, 8):
        found = [places[each] for each in search(missed, steps - 1)] + [0]
        even = [round(1000 - 960 * i / (steps - 1)) for i in range(steps)] + [0]
        assert error(found) < 0.8 * error(even)


# ---- what a run keeps ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with a run, and with what tools.steps has found for it in the run `found`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        paint(Path("pictures"))
        command_line.plan("ddpm.py", {"train": ddpm.train}, [*TRAIN, "--epochs=8"])()
        shutil.copytree("models/run", "models/found")
        tools.steps.steps("found", device="cpu")
        return Path.cwd()


def paths_of(run_name: str) -> dict:
    return checkpoints.load(run_name)["paths"]


def pictures(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("results", folder).glob("sample_*.png")}


def command_in(path: Path) -> list[str]:
    with Image.open(path) as picture:
        return shlex.split(picture.text["command"], comments=True)


def test_steps_of_4_to_10_are_kept_and_the_rest_of_the_run_stays(here):
    before, after = checkpoints.load("run"), checkpoints.load("found")
    paths = after.pop("paths")
    assert before.keys() == after.keys()
    assert before["settings"] == after["settings"]
    assert all(
        torch.equal(before["average"][name], after["average"][name]) for name in after["average"]
    )
    assert are_paths(paths, NOISE_STEPS, ddpm.SAMPLERS)
    assert [len(visited) - 1 for visited in paths["visited"]] == [*range(4, 11)]
    assert all(visited[-2] == 2 for visited in paths["visited"])  # a 25th of 60


def test_sample_takes_the_steps_of_the_run_and_says_so(here, run):
    result = run("sample", "--run_name=found", "--n_img=2", "--steps=5", DEVICE)
    path = ",".join(map(str, paths_of("found")["visited"][1]))
    assert f"steps    5, found for this run: t = {path}\n" in result.out
    words = command_in(Path("results/found/samples/sample_0001.png"))
    assert {f"--spacing={path}", "--sampler=unipc"} < {*words}
    result = run("sample", "--run_name=found", "--n_img=2", DEVICE)
    assert f"steps    {paths_of('found')['default']}, found for this run" in result.out
    other = run("sample", "--run_name=found", "--n_img=2", "--steps=5", "--spacing=even", DEVICE)
    assert "found for" not in other.out
    words = ("--n_img=1", "--sampler=dpm++", "--steps=5")
    assert (
        f"found for this run: t = {path}\n" in run("sample", "--run_name=found", *words, DEVICE).out
    )
    for words in (["--steps=11"], ["--sampler=ddim", "--steps=5"]):
        assert "found for" not in run("sample", "--run_name=found", "--n_img=1", *words, DEVICE).out
    assert "--spacing=log-noise" in command_in(Path("results/found/samples_5/sample_0001.png"))
    assert pictures("found/samples") != pictures("found/samples_3")


def test_the_command_of_a_png_makes_it_again_when_other_steps_are_found(here, run):
    assert run("sample", "--run_name=found", "--n_img=2", "--steps=5", DEVICE).status == 0
    stored = checkpoints.load("found")
    stored["paths"] = kept("dpm++", 5, [(60, 40, 30, 20, 10, 0)])
    checkpoints.write(checkpoints.paths_of("found")[0], **stored)
    words = command_in(Path("results/found/samples/sample_0001.png"))
    result = run(*words[2:], DEVICE, "--name=again")
    assert result.status == 0, result.err
    assert pictures("found/samples") == pictures("found/again")


def test_image_to_image_takes_the_end_of_the_found_steps(here, run):
    words = ("--n_img=1", "--steps=6", "--init_image=pictures/picture_0000.png", "--strength=0.5")
    result = run("sample", "--run_name=found", *words, DEVICE)
    left = [30, *(t for t in by_number(paths_of("found"))[6] if t < 30)]
    told = f"steps    {len(left) - 1}, found for this run: t = {','.join(map(str, left))}"
    assert told in result.out, result.err
    words = ("--n_img=1", "--init_image=pictures/picture_0000.png", "--strength=0")
    assert "found for" not in run("sample", "--run_name=found", *words, DEVICE).out
    for wrong in ("--init_image=none.png", "--img_size=13", "--guide=nobody"):
        result = run("sample", "--run_name=found", "--n_img=1", wrong, DEVICE)
        assert (refused(result), result.out) == (result.err, "")


@pytest.mark.parametrize("spacing", [name for name in SPACINGS if name != "even"])
def test_image_to_image_takes_all_steps_from_where_it_begins(spacing):
    """Of even ones those are left that lie below; steps by the noise are spread anew."""
    diffusion = ddpm.Diffusion(1000, "cosine")
    for start, strength in ((600, 0.6), (30, 0.03), (3, 0.003), (0, 0.0)):
        visited = diffusion.visited_steps(8, strength, spacing)
        assert visited[0] == start and visited[-1] == 0
        assert len(visited) - 1 == min(8, start)
        assert all(t > t_next for t, t_next in itertools.pairwise(visited))
    assert diffusion.visited_steps(8, 0.6, spacing)[-2] == 40
    assert diffusion.visited_steps(8, 0.3, spacing)[-2] == 40
    assert diffusion.visited_steps(4, 0.6, "even") == [600, 500, 250, 0]


def test_image_to_image_leaves_out_a_named_step_that_is_all_but_its_start():
    """The extrapolation from two guesses next to each other would be a hundred times their gap."""
    diffusion, named = ddpm.Diffusion(1000, "cosine"), "1000,750,500,250,0"
    assert diffusion.visited_steps(4, 0.524, named) == [524, 250, 0]
    assert diffusion.visited_steps(4, 0.526, named) == [526, 500, 250, 0]
    assert diffusion.visited_steps(4, 0.5, named) == [500, 250, 0]
    assert diffusion.visited_steps(4, 0.001, named) == [1, 0]
    assert diffusion.visited_steps(3, 1.0, "1000,999,500,0") == [1000, 999, 500, 0]


def test_found_steps_are_measured_by_usual_ones_with_the_same_last_step():
    diffusion = ddpm.Diffusion(1000, "cosine")
    usual = diffusion.visited_steps(8, spacing=ddpm.USUAL.spacing)
    assert tools.steps.usual_steps(diffusion, 40) == [*usual[:-2], 40, 0]
    assert tools.steps.usual_steps(diffusion, 500) == [*(t for t in usual if t > 500), 500, 0]


def test_a_published_and_an_exported_run_keep_their_steps(here, exchange):
    assert exchange("publish", "--run_name=found", "--to=given").status == 0
    assert paths_of("given") == paths_of("found")
    assert exchange("export", "--run_name=found", "--to=folder").status == 0
    assert exchange("import", "--source=folder", "--run_name=back").status == 0
    assert paths_of("back") == paths_of("found")
    assert exchange("export", "--run_name=run", "--to=plain").status == 0
    assert exchange("import", "--source=plain", "--run_name=bare").status == 0
    assert "paths" not in checkpoints.load("bare")


@pytest.mark.parametrize(
    "text", ["[", "[1]", '{"sampler": "dpm++", "default": 2, "visited": [[60, 0]], "teacher": ""}']
)
def test_strange_steps_of_an_export_are_refused(here, exchange, text):
    assert exchange("export", "--run_name=found", "--to=folder").status == 0
    Path("folder/paths.json").write_text(text)
    line = refused(exchange("import", "--source=folder", "--run_name=back"))
    assert "cannot be" in line
    assert not Path("models/back").exists()


def test_a_training_that_goes_on_drops_the_steps_and_a_fine_tuning_has_none(here, run):
    words = [word.replace("=run", "=found") if "run_name" in word else word for word in TRAIN]
    result = run(*words, "--epochs=9")
    assert (result.status, "are dropped as soon as it learns more" in result.out) == (0, True)
    assert "paths" not in checkpoints.load("found")
    tools.steps.steps("run", device="cpu")
    words = [word.replace("=run", "=tuned") if "run_name" in word else word for word in TRAIN]
    assert run(*words, "--init_from=run", "--epochs=1").status == 0
    assert "paths" not in checkpoints.load("tuned")


@pytest.mark.parametrize(
    "paths",
    [
        {"sampler": "dpm++"},
        kept("dpm++", 5, [(60, 20, 0)]),
        kept("dpm++", 2, [(60, 60, 0)]),
        kept("dpm++", 2, [(61, 20, 0)]),
        kept("dpm++", 2, [(60, 20.0, 0)]),
        kept("dpm++", 1, [(60, -1)]),
        kept("euler", 2, [(60, 20, 0)]),
        kept("auto", 2, [(60, 20, 0)]),
    ],
)
def test_paths_that_are_none_are_refused(here, run, paths):
    stored = checkpoints.load("found") | {"paths": paths}
    checkpoints.write(checkpoints.paths_of("found")[0], **stored)
    assert "entries that do not fit" in refused(run("sample", "--run_name=found", DEVICE))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--spacing=odd"],
            "--spacing=odd is not one of: auto, even, log-snr, rho-7, log-noise, nor values",
        ),
        (["--spacing=60,20,30,0"], "that fall from 60 to 0"),
        (["--spacing=50,20,0"], "that fall from 60 to 0"),
        (["--spacing=60,20,0", "--steps=3"], "names 2 steps; leave out --steps=3"),
        (["--steps=many"], "--steps=many is not a whole number or auto"),
        (["--sampler=euler"], "is not one of: auto, ddpm, ddim, dpm++, ipndm, unipc"),
    ],
)
def test_steps_that_do_not_fit_are_refused(here, run, words, message):
    assert message in refused(run("sample", "--run_name=run", *words, DEVICE))
    assert not Path("results/run/samples").exists()


def test_steps_refuses_a_last_step_that_leaves_no_choice(here, run_main):
    words = ("--run_name=run", DEVICE, "--last=20")
    assert "are too few to choose from" in refused(run_main(tools.steps.main, *words))
    assert "paths" not in checkpoints.load("run")


def test_all_steps_of_ddpm_are_algorithm_2_whatever_the_spacing(here, run):
    """Bits included: there is no choice of steps where all are visited."""
    for spacing in ("even", "log-snr", "auto"):
        words = ("--n_img=2", "--sampler=ddpm", f"--steps={NOISE_STEPS}", f"--spacing={spacing}")
        assert run("sample", "--run_name=found", *words, f"--name={spacing}", DEVICE).status == 0
    assert pictures_pixels("even") == pictures_pixels("log-snr") == pictures_pixels("auto")


def pictures_pixels(name: str) -> list[bytes]:
    found = []
    for path in sorted(Path("results/found", name).glob("sample_*.png")):
        with Image.open(path) as picture:
            found.append(picture.tobytes())
    assert found
    return found


def test_found_steps_suit_two_samplers_and_learned_ones_their_own():
    path = [(60, 20, 0)]
    assert suited(kept("dpm++", 2, path)) == suited(kept("unipc", 2, path)) == ("unipc", "dpm++")
    assert suited(kept("ddim", 2, path)) == ("ddim",)
    assert suited(kept("dpm++", 2, path, teacher="run")) == ("dpm++",)


def test_a_run_without_steps_of_its_own_is_sampled_as_usual():
    checkpoint = {"settings": {"noise_steps": 1000}}
    assert choose(AUTO, checkpoint, ddpm.USUAL) == ddpm.USUAL
    assert choose(Way("ddim", 50, "auto"), checkpoint, ddpm.USUAL).spacing == ddpm.USUAL.spacing
    few = {"settings": {"noise_steps": 3}}
    assert choose(AUTO, few, ddpm.USUAL).steps == 3


# ---- distillation --------------------------------------------------------------------------------


class TwoPeaks(nn.Module):
    """The perfect network of values that are half N(-0.6, 0.1^2) and half N(0.6, 0.1^2)."""

    mean, std = 0.6, 0.1

    def __init__(self, diffusion: Diffusion):
        super().__init__()
        self.diffusion = diffusion

    def forward(self, x_t: Tensor, t: Tensor, labels: None = None) -> Tensor:
        """v, from E[x_0 | x_t]."""
        signal, noise = (each.double() for each in self.diffusion.at(t))
        x_t = x_t.double()
        variance = (signal * self.std) ** 2 + noise**2  # of x_t around each peak
        means = torch.stack([-self.mean * signal + 0 * x_t, self.mean * signal + 0 * x_t])
        shares = (-((x_t - means) ** 2) / (2 * variance)).softmax(dim=0)
        centers = torch.tensor([-self.mean, self.mean]).view(2, 1, 1, 1, 1)
        guesses = centers + signal * self.std**2 / variance * (x_t - means)
        x_0 = (shares * guesses).sum(dim=0)
        return ((signal * x_t - x_0) / noise).float()

    def exact(self, z: Tensor) -> Tensor:
        """Where the probability flow leads from the noise z: as many of the values lie below."""
        grid = torch.linspace(-1.2, 1.2, 4801, dtype=torch.float64)
        normal = torch.distributions.Normal(0.0, 1.0)
        below = [normal.cdf((grid - mean) / self.std) for mean in (-self.mean, self.mean)]
        places = torch.searchsorted((below[0] + below[1]) / 2, normal.cdf(z.double()))
        return grid[places.clamp(max=4800)]


class Curve(nn.Module):
    """v of one value by a small perceptron of it, at any t."""

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x_t: Tensor, t: Tensor, labels: None = None) -> Tensor:
        return self.layers(x_t.unsqueeze(-1)).squeeze(-1)


def test_a_student_learns_to_jump_to_where_the_flow_leads():
    """In one step, of data whose flow is known; without learning, one step leads to the mean."""
    torch.manual_seed(0)
    diffusion = Diffusion(300, "cosine", "v")
    teacher, student = tools.distill.Guided(TwoPeaks(diffusion)), Curve()
    path = diffusion.visited_steps(60)
    how = {"batch_size": 256, "lr": 5e-3, "seed": 0, "precision": "float32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools.distill, "SHORT_STEPS", 60)
        distillation = tools.distill.Distillation(
            teacher, student, diffusion, path, (1, 1, 1), **how
        )
        for number in range(300):
            distillation.advance(number / 300)
    z = torch.linspace(-2, 2, 81)
    z = z[z.abs() > 0.15].view(-1, 1, 1, 1)  # between the peaks the flow is as good as a jump
    with torch.no_grad():
        made = distillation.step(z, 300, 0)
        at_once = distillation.guess(teacher, z, 300)
    exact = teacher.network.exact(z)
    assert (at_once - exact).abs().mean() > 0.5
    assert (made - exact).abs().mean() < 0.06


@pytest.mark.parametrize("objective", ddpm.OBJECTIVES)
def test_a_student_practises_what_sampling_does_and_learns_where_it_is_clipped(objective):
    """Near T a small eps stands for a guess far outside [-1, 1]."""
    torch.manual_seed(0)
    diffusion, network = Diffusion(60, "linear", objective), Curve()
    network.channels = 1
    how = {"batch_size": 4, "lr": 1e-3, "seed": 0, "precision": "float32"}
    teacher = tools.distill.Guided(network)
    student = tools.distill.Distillation(teacher, network, diffusion, [60, 0], (1, 2, 2), **how)
    walk = {"visited_steps": [60, 30, 0], "sampler": "ddim", "precision": "float32"}
    with torch.no_grad():
        sampled, _ = next(ddpm.generate(network, diffusion, range(4), (2, 2), **walk))
    noise = np.stack([next(noise_of(seed, (1, 2, 2))) for seed in range(4)])
    arrived = student.step(torch.from_numpy(noise), 60, 30)
    torch.testing.assert_close(arrived, sampled)
    guess = student.guess(teacher, torch.from_numpy(noise), 60)
    assert (guess.abs() > 1).all() == (objective == "eps")
    arrived.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in network.parameters())


class Level(nn.Module):
    """Takes every image for one of a single level, which its class decides; the last is no class.

    Its levels are learned.
    """

    def __init__(self, *levels: float):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels))
        self.null_class = len(levels) - 1

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.levels[labels].view(-1, 1, 1, 1).expand_as(x_t)


@pytest.mark.parametrize(
    ("guide", "ends"), [(None, (0.1 + 0.2, 0.1 - 0.8)), (Level(0.2, -0.2), (0.2, -0.4))]
)
def test_a_student_learns_where_guidance_leads_its_teacher(guide, ends):
    """From no class, or from a guide, twice as far as to the class; each class to its own level."""
    diffusion = Diffusion(300, "cosine", "x0")
    asked = tools.distill.Guided(Level(0.2, -0.3, 0.1), 2, 2.0, guide)
    student = Level(0.0, 0.0, 0.7)
    how = {"batch_size": 16, "lr": 0.02, "seed": 0, "precision": "float32", "optimizer": "adamw"}
    path = diffusion.visited_steps(tools.distill.SHORT_STEPS)
    distillation = tools.distill.Distillation(asked, student, diffusion, path, (1, 2, 2), **how)
    for number in range(200):
        distillation.advance(number / 200)
    torch.testing.assert_close(student.levels, torch.tensor([*ends, 0.7]), atol=1e-4, rtol=0)


@pytest.fixture
def distill(here, run_main):
    """Run `python -m tools.distill` from the run `run` to the run `fast`."""
    words = ("--run_name=run", "--to=fast", "--steps=2", "--batch_size=4", "--max_minutes=0")

    def run_words(*more: str):
        given = {word.partition("=")[0] for word in more}
        kept_words = [word for word in words if word.partition("=")[0] not in given]
        return run_main(tools.distill.main, *kept_words, *more, DEVICE)

    return run_words


def test_a_student_is_taught_where_it_is_itself_not_where_its_teacher_would_be(monkeypatch):
    """Else it would never learn to mend what its first step did."""
    torch.manual_seed(0)
    diffusion = Diffusion(300, "cosine", "v")
    places, asked = [], []
    step, follow = tools.distill.Distillation.step, tools.distill.Distillation.follow_teacher

    def note_step(self, x_t: Tensor, *how) -> Tensor:
        places.append((x_t, step(self, x_t, *how)))
        return places[-1][1]

    def note_follow(self, x_t: Tensor, *how) -> Tensor:
        asked.append(x_t)
        return follow(self, x_t, *how)

    monkeypatch.setattr(tools.distill.Distillation, "step", note_step)
    monkeypatch.setattr(tools.distill.Distillation, "follow_teacher", note_follow)
    how = {"batch_size": 4, "lr": 1e-3, "seed": 0, "precision": "float32"}
    path = diffusion.visited_steps(3 * tools.distill.SHORT_STEPS)
    networks = tools.distill.Guided(TwoPeaks(diffusion)), Curve()
    tools.distill.Distillation(*networks, diffusion, path, (1, 1, 1), **how).advance(0.0)
    (_, first), (begun, second), (last, _) = places
    assert torch.equal(begun, first) and torch.equal(last, second)
    assert torch.equal(asked[1], first) and torch.equal(asked[2], second)


def test_a_distilled_run_is_a_run_that_says_from_whom_and_for_which_steps(distill, run, exchange):
    assert distill("--walks=12").status == 0
    paths = paths_of("fast")
    fingerprint = checkpoints.fingerprint_of(checkpoints.load("run")["average"])
    assert (paths["sampler"], paths["default"]) == ("ddim", 2)
    assert paths["teacher"] == f"run {fingerprint}"
    result = run("sample", "--run_name=fast", "--n_img=2", DEVICE)
    assert "steps    2, distilled from run " in result.out
    words = command_in(Path("results/fast/samples/sample_0001.png"))
    assert {"--sampler=ddim", "--steps=2"} <= set(words)
    result = run("sample", "--run_name=fast", "--n_img=2", "--steps=5", DEVICE)
    assert "steps    5 of ddim; this run was distilled for 2 steps of ddim" in result.out
    assert exchange("publish", "--run_name=fast", "--to=given").status == 0
    assert paths_of("given") == paths
    weights = checkpoints.load("fast")["average"]
    assert not torch.equal(
        weights["conv_in.weight"], checkpoints.load("run")["average"]["conv_in.weight"]
    )


def test_a_distilled_run_of_classes_has_its_guidance_in_it(
    distill, run, run_main, exchange, monkeypatch
):
    for name in ("a", "b"):
        paint(Path("sorted", name))
    words = [word.replace("=pictures", "=sorted").replace("=run", "=classes") for word in TRAIN]
    assert run(*words, "--conditional", "--epochs=2").status == 0
    words = ("--run_name=classes", "--guidance=3")
    teachers, advance = [], tools.distill.Distillation.advance

    def note(self, fraction_done: float) -> Tensor:
        teachers.append((self.teacher.classes, self.teacher.guidance, self.teacher.guide))
        return advance(self, fraction_done)

    with monkeypatch.context() as patch:
        patch.setattr(tools.distill.Distillation, "advance", note)
        assert distill("--walks=8", *words).status == 0
    assert teachers == [(2, 3.0, None)] * 2
    fingerprint = checkpoints.fingerprint_of(checkpoints.load("classes")["average"])
    assert paths_of("fast")["teacher"] == f"classes {fingerprint} with guidance 3"
    assert run("sample", "--run_name=fast", "--n_img=2", DEVICE).status == 0
    first = command_in(Path("results/fast/samples/sample_0001.png"))
    assert {"--label=a,b", "--guidance=1"} <= set(first)
    assert run(*first[2:], "--name=again", DEVICE).status == 0
    assert pictures("fast/samples") == pictures("fast/again")
    for more in ("--guidance=2", "--guide=classes"):
        line = refused(run("sample", "--run_name=fast", more, DEVICE))
        assert f"{more}: this run has learned its guidance from classes" in line
    words_to_judge = ("--run_name=fast", "--guidance=2", DEVICE)
    assert "has learned its guidance" in refused(run_main(tools.evaluate.main, *words_to_judge))
    how = (ddpm.load_run("fast"), range(2), Way("ddim", 2, "60,32,0"), 2, torch.device("cpu"))
    judged = [tools.evaluate.make_samples(*how, guidance=each) for each in ("auto", 1.0, 2.0)]
    assert torch.equal(judged[0], judged[1]) and not torch.equal(judged[0], judged[2])
    assert tools.play_images.is_led("classes") and not tools.play_images.is_led("fast")
    assert tools.play_images.guides_of("fast") == [""]
    assert "with guidance 2" in refused(distill("--walks=16", "--run_name=classes"))
    assert "nothing to do" in distill("--walks=8", *words).out
    assert exchange("export", "--run_name=fast", "--to=given").status == 0
    card = Path("given/README.md").read_text()
    assert f"distilled from `classes {fingerprint} with guidance 3` for DDIM" in card
    assert "t = 60, 32, 0," in card and "answer = network(x_t, t, labels).sample" in card
    assert "stands for no class" not in card
    stored = checkpoints.load("fast")
    strange = {"teacher": "{evil} `{name}`", "visited": ((60, 9, 0), (60, 0))}
    checkpoints.write(
        checkpoints.paths_of("fast")[0], **stored | {"paths": stored["paths"] | strange}
    )
    assert exchange("export", "--run_name=fast", "--to=strange").status == 0
    assert "distilled from `{evil} '{name}'` for DDIM" in Path("strange/README.md").read_text()


def test_a_student_of_a_guided_teacher_says_by_whom_it_was_guided(distill, run):
    assert distill("--walks=8", "--guide=early", "--guidance=1.5").status == 0
    assert " with guidance 1.5 from early " in paths_of("fast")["teacher"]
    assert distill("--walks=8", "--to=plain").status == 0
    weights = [checkpoints.load(name)["average"]["conv_in.weight"] for name in ("fast", "plain")]
    assert not torch.equal(*weights)
    again = ("sample", "--n_img=1", "--guide=run", "--guidance=1.5", DEVICE)
    assert run(*again, "--run_name=fast").status == 0
    line = refused(distill("--to=new", "--guidance=3", "--walks=8"))
    assert "--guidance=3 is for class-conditional runs" in line


def test_a_stopped_distillation_goes_on_to_the_bit(distill, monkeypatch):
    assert distill("--walks=24").status == 0
    whole = checkpoints.load("fast")
    shutil.rmtree("models/fast")
    advance = tools.distill.Distillation.advance

    def stop_at_two(self, fraction_done):
        losses = advance(self, fraction_done)
        if self.round == 2:
            signal.raise_signal(signal.SIGINT)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(tools.distill.Distillation, "advance", stop_at_two)
        result = distill("--walks=24")
    assert (result.status, "stopped and saved" in result.out) == (130, True)
    assert checkpoints.load("fast")["step"] == 2
    assert distill("--walks=24").status == 0
    again = checkpoints.load("fast")
    assert again["step"] == whole["step"] == 6
    assert checkpoints.fingerprint_of(again["average"]) == checkpoints.fingerprint_of(
        whole["average"]
    )
    assert "nothing to do" in distill("--walks=24").out


def test_a_student_of_before_muon_goes_on_with_adamw(distill, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tools.distill, "OPTIMIZER", "adamw")
        assert distill("--walks=8").status == 0
    assert distill("--walks=16").status == 0
    assert distill("--walks=8", "--to=new").status == 0
    for name, optimizer in (("fast", "adamw"), ("new", "muon")):
        stored = checkpoints.load(name)
        assert stored["settings"]["optimizer"] == optimizer
        has_squares = ["exp_avg_sq" in each for each in stored["optimizer"]["state"].values()]
        assert all(has_squares) == (optimizer == "adamw")


def test_fine_tuning_a_student_names_its_teacher(distill, run):
    assert distill("--walks=4").status == 0
    words = ("train", "--dataset=pictures", *TINY, f"--noise_steps={NOISE_STEPS}", "--epochs=1")
    for begin, is_named in (("fast", True), ("run", False)):
        result = run(*words, f"--init_from={begin}", f"--run_name=from_{begin}")
        assert result.status == 0, result.err
        assert ("fast was distilled from run" in result.out) == is_named


def test_what_cannot_be_distilled_is_refused(distill, run, run_main):
    assert distill("--walks=4").status == 0
    for words, message in (
        (["--batch_size=2"], "--batch_size=2: --to=fast is another distillation; it began with"),
        (["--seed=5"], "--seed=5: --to=fast is another distillation; it began with --seed=0"),
        (["--steps=3"], "--to=fast is distilled for 2 steps, not 3"),
        (["--to=found"], "models/found holds another run"),
        (["--to=new", "--run_name=fast"], "was itself distilled from run"),
        (["--to=new", "--steps=16", "--run_name=few"], "--steps=16 is too many for the 20"),
        (["--to="], "--to is missing"),
        (["--to=new", "--steps=17"], "--steps=17 is out of range"),
        (["--to=new", "--max_minutes=1e-9"], "--max_minutes=1e-09 is too short; nothing was"),
    ):
        if "--run_name=few" in words:
            stored = checkpoints.load("run")
            stored["settings"] |= {"noise_steps": 20, "run_name": "few"}
            checkpoints.write(checkpoints.paths_of("few")[0], **stored)
        line = refused(distill(*words))
        assert message in line
    assert not Path("models/new").exists()
    stored = checkpoints.load("fast")
    other = stored["paths"] | {"visited": ((60, 20, 0),)}
    checkpoints.write(checkpoints.paths_of("fast")[0], **stored | {"paths": other})
    assert "other values of t" in refused(distill("--walks=8"))
    line = refused(run(*[word.replace("=run", "=fast") for word in TRAIN], "--epochs=9"))
    assert "models/fast was distilled from run" in line
    assert "; the same `python -m tools.distill` command continues it" in line
    assert "was distilled from" in refused(run_main(tools.steps.main, "--run_name=fast", DEVICE))
