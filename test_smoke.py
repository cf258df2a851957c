"""Run all tests: python -m pytest. A quick check, in half a minute: python -m pytest -k smoke_run

They need no network and no GPU; what needs CUDA is skipped without it.
"""

import argparse
import ast
import errno
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import fid
import gan_qp
import sgan_sn
import wgan_gp

HERE = Path(__file__).parent
SCRIPTS = ["gan_qp", "wgan_gp", "sgan_sn"]
MODULES = [gan_qp, wgan_gp, sgan_sn]
TINY = [
    "--data",
    "synthetic:12",
    "--img-size",
    "16",
    "--batch-size",
    "4",
    "--max-channels",
    "8",
    "--z-dim",
    "8",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(cache, monkeypatch, capsys):
    """cli("gan_qp", flags...) runs a script as its command line does -> (code, stdout, stderr)."""

    def run(script, *flags):
        own = [] if script == "fid" else ["--cache-dir", str(cache)]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags), *own])
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        code = 0
        capsys.readouterr()
        try:
            runpy.run_path(str(HERE / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in handlers.items():
                if signal.getsignal(number) != handler:
                    signal.signal(number, handler)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights under pytorch-fid's names, drawn so that the features do not vanish."""
    from torchvision.models.inception import inception_v3

    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(inception_file):
    return fid.load_inception(inception_file)


def refused(result, *words):
    """The script ended with one line on standard error that holds these words, and exit code 2."""
    code, _, err = result
    lines = [line for line in err.splitlines() if ".py: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]


def weights(path):
    return torch.load(path, weights_only=True)


def log_of(run):
    with open(run / "log.jsonl") as file:
        return [json.loads(line) for line in file]


def assert_same(a, b, path=""):
    """Equal to the bit, however deeply nested; except the log, with its clock, and the flags."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"log", "args"}:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def start(words, **options):
    """A process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [str(word) for word in words],
        text=True,
        env={**environment, **options.pop("env", {})},
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.STDOUT),
        **options,
    )


def command(script, *flags, **options):
    return start([sys.executable, HERE / f"{script}.py", *flags], **options)


def make_image(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --------------------------------------------------------------------------- smoke


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run(script, cli, inception_file, tmp_path):
    """Two iterations, FID, samples."""
    fid_flags = ["--fid-every", 2, "--fid-samples", 4, "--fid-weights", inception_file]
    assert cli(script, *TINY, *fid_flags, "--iters", 2, "--out", tmp_path / "run")[0] == 0
    assert log_of(tmp_path / "run")[-1]["fid"] > 0
    images = tmp_path / "images"
    sampling = ["--sample", tmp_path / "run" / "best.pt", "--num-samples", 3, "--device", "cpu"]
    assert cli(script, *sampling, "--out", images)[0] == 0
    code, out, _ = cli("fid", images, images, "--weights", inception_file, "--device", "cpu")
    assert code == 0 and float(out) == pytest.approx(0, abs=1e-3)


# --------------------------------------------------------------------------- the method


@pytest.mark.parametrize("power", [2, 4, 6])
@pytest.mark.parametrize("lam, d", [(10.0, 0.3), (1.0, 0.02), (100.0, 1.5)])
def test_supremum_of_the_potential(power, lam, d):
    delta = torch.linspace(0, 2 * lam * d, 20001, dtype=torch.float64)
    value = gan_qp.qp_divergence(delta, torch.full_like(delta, d), lam, power)
    assert value.max().item() == pytest.approx(lam * d * (1 - 1 / power), rel=1e-6)
    assert delta[value.argmax()].item() == pytest.approx(lam * d, rel=1e-3)
    if power == 2:
        torch.testing.assert_close(value, delta - delta**2 / (2 * lam * d))


def test_optimal_discriminator(capsys):
    """On five points the best T is lambda d (a - b) / (a + b), and its value the divergence."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(5, 2)))
    p = torch.from_numpy(rng.dirichlet(np.ones(5)))
    q = torch.from_numpy(rng.dirichlet(np.ones(5)))
    d = torch.cdist(x, x)
    off = ~torch.eye(5, dtype=torch.bool)
    T = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [T],
        max_iter=500,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
    )

    def loss():
        optimizer.zero_grad()
        value = -(p[:, None] * q[None] * gan_qp.qp_divergence(T - T.T, d, 10.0))[off].sum()
        value.backward()
        return value

    optimizer.step(loss)
    a = p[:, None] * q[None]
    b = q[:, None] * p[None]
    best = (10 * d * (a - b) / (a + b))[off]
    error = ((T - T.T).detach()[off] - best).abs().max().item()
    with capsys.disabled():
        found = f"{best.min():.2f} to {best.max():.2f}, found within {error:.0e}"
        print(f"\n\nbest delta on five points: {found}")
    assert error < 1e-6
    divergence = (5 * d * (a - b) ** 2 / (a + b))[off].sum().item() / 2
    assert -loss().item() == pytest.approx(divergence, rel=1e-6)


def test_distance_is_for_each_pair():
    x = torch.zeros(3, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, -1.0)])
    y[1, 0] = 0
    for module in MODULES:
        for metric, middle in (("l1", 1 / 3), ("l2", math.sqrt(1 / 6))):
            expected = torch.tensor([0.0, middle, 1.0])
            torch.testing.assert_close(module.pair_distance(x, y, metric), expected)


def test_shapes_that_would_broadcast_are_refused():
    """Scores (B, 1) against distances (B,) would give (B, B), and another optimum."""
    images = torch.rand(4, 3, 8, 8)
    scores = torch.rand(4)
    for module in MODULES:
        with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\) and \(1, 3, 8, 8\)"):
            module.pair_distance(images, images[:1])
        with pytest.raises(ValueError, match=r"\(4, 1\) and \(4,\)"):
            module.lipschitz_ratio(scores[:, None], scores)
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4,\)"):
        gan_qp.qp_divergence(scores[:, None], scores)
    with pytest.raises(ValueError, match="metric"):
        gan_qp.pair_distance(images, images, "cosine")
    for penalty in (wgan_gp.gradient_penalty, wgan_gp.divergence_penalty):
        with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\) and \(1, 3, 8, 8\)"):
            penalty(lambda x: x.sum((1, 2, 3)), images, images[:1])
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4,\)"):
        sgan_sn.js_divergence(scores[:, None], scores)


@pytest.mark.parametrize("power", [2, 4, 6])
@pytest.mark.parametrize("lam", [1e-3, 10.0, 1e6])  # --lam's bounds
def test_divergence_is_finite(power, lam):
    for d in (0.0, 0.3, 2.0):  # 0: identical images
        delta = torch.tensor([-1.0, 0.0, 1.0, lam * d, -lam * d], requires_grad=True)
        value = gan_qp.qp_divergence(delta, torch.full((5,), d), lam, power).sum()
        value.backward()
        assert value.isfinite() and delta.grad.isfinite().all()


def test_generator_loss_of_pairs_is_delta_alone():
    torch.manual_seed(0)
    D = gan_qp.Discriminator(16, 8, pairwise=True).eval()
    x_real = torch.randn(4, 3, 16, 16)
    x_fake = torch.randn(4, 3, 16, 16, requires_grad=True)
    delta = D(torch.cat([x_real, x_fake], 1)) - D(torch.cat([x_fake, x_real], 1))
    (expected,) = torch.autograd.grad(delta.mean(), x_fake)
    loss = gan_qp.generator_loss(D, x_real, x_fake, argparse.Namespace(lam=10.0, pairwise=True))
    torch.testing.assert_close(torch.autograd.grad(loss, x_fake)[0], expected)


def test_lipschitz_ratio_uses_the_metric():
    torch.manual_seed(0)
    D = gan_qp.Discriminator(16, 8).eval()
    x_real, x_fake = torch.randn(2, 4, 3, 16, 16)
    for metric in ("l1", "l2"):
        args = argparse.Namespace(metric=metric, lam=10.0, power=2, pairwise=False)
        ratio = (D(x_real) - D(x_fake)).abs() / gan_qp.pair_distance(x_real, x_fake, metric)
        logged = gan_qp.discriminator_loss(D, x_real, x_fake, args)[2]
        torch.testing.assert_close(logged, ratio.mean())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_penalties_of_a_linear_critic(dtype):
    """In closed form, in the type of the images, and finite where the gradient is exactly zero."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 1, bias=False).to(dtype)
    x, y = torch.randn(2, 5, 3, 2, 2).to(dtype)

    def D(images):
        return linear(images.flatten(1)).squeeze(1)

    norm = linear.weight.double().norm().item()
    digits = {"rel": 1e-9 if dtype == torch.float64 else 1e-5}
    assert wgan_gp.gradient_penalty(D, x, y).item() == pytest.approx((norm - 1) ** 2, **digits)
    assert wgan_gp.divergence_penalty(D, x, y).item() == pytest.approx(2 * norm**6, **digits)
    nn.init.zeros_(linear.weight)
    for penalty in (wgan_gp.gradient_penalty(D, x, y), wgan_gp.divergence_penalty(D, x, y)):
        (gradient,) = torch.autograd.grad(penalty, linear.weight)
        assert penalty.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("penalty", [wgan_gp.gradient_penalty, wgan_gp.divergence_penalty])
def test_critics_own_gradient_is_autograds(penalty):
    torch.manual_seed(0)
    D = wgan_gp.Discriminator(32, 32)
    x, y = torch.randn(2, 4, 3, 32, 32)
    own = wgan_gp.Discriminator.input_gradient
    results = []
    for way in (own, wgan_gp.autograd_gradient):
        D.zero_grad()
        torch.manual_seed(1)
        value = penalty(D, x, y, input_gradient=way)
        (value + D(x).mean()).backward()
        results.append([value.detach(), *(p.grad for p in D.parameters())])
    for ours, autograds in zip(*results, strict=True):
        assert (ours - autograds).norm() <= 1e-5 * autograds.norm()

    with torch.autocast("cpu", torch.bfloat16):
        value = penalty(D, x, y, input_gradient=own)
        (low,) = torch.autograd.grad(value, D.layers[0].weight)
    value = penalty(D, x, y, input_gradient=own)
    (high,) = torch.autograd.grad(value, D.layers[0].weight)
    assert F.cosine_similarity(low.flatten(), high.flatten(), dim=0) > 0.9


def test_spectral_norm():
    torch.manual_seed(0)
    for D in (sgan_sn.Discriminator(16, 16), wgan_gp.Discriminator(16, 16, sn=True)):
        for _ in range(200):
            D(torch.randn(2, 3, 16, 16))
        layers = [m for m in D.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            assert norm.item() == pytest.approx(1, abs=1e-2)
        assert len(layers) == 3 and not any(isinstance(m, nn.BatchNorm2d) for m in D.modules())
        before = D.state_dict()["linear.parametrizations.weight.0._u"].clone()
        D.eval()(torch.randn(2, 3, 16, 16))
        assert torch.equal(before, D.state_dict()["linear.parametrizations.weight.0._u"])


def test_js_divergence():
    torch.manual_seed(0)
    T = torch.randn(1000)
    far = torch.full((5,), 50.0)
    same = sgan_sn.js_divergence(torch.zeros(5), torch.zeros(5))
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert sgan_sn.js_divergence(far, -far).item() == pytest.approx(math.log(2))
    expected = 0.5 * T.sigmoid().log().mean() + 0.5 * (1 - T.sigmoid()).log().mean() + math.log(2)
    torch.testing.assert_close(sgan_sn.js_divergence(T, T), expected)


def train_on_point_masses(kind, distance, steps=1500):
    """Train T on the masses 0 and `distance` -> (divergence, gradient at the generator's mass)."""
    torch.manual_seed(0)
    T = nn.Sequential(nn.Linear(1, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    a = torch.zeros(64, 1)
    b = torch.full((64, 1), distance)
    optimizer = torch.optim.Adam(T.parameters(), 1e-2, (0.5, 0.9), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def value(x_fake):
        real = T(a).squeeze(1)
        fake = T(x_fake).squeeze(1)
        if kind == "SGAN":
            return sgan_sn.js_divergence(real, fake)
        if kind == "KL":
            return real.mean() - (fake - 1).exp().mean()
        if kind == "WGAN-GP":
            return (real - fake).mean()
        return gan_qp.qp_divergence(real - fake, gan_qp.pair_distance(a, x_fake.detach())).mean()

    for _ in range(steps):
        penalty = 10 * wgan_gp.gradient_penalty(T, a, b) if kind == "WGAN-GP" else 0
        optimizer.zero_grad()
        (penalty - value(b)).backward()
        optimizer.step()
        schedule.step()

    b.requires_grad_()
    goal = (T(a) - T(b)).mean() if kind == "GAN-QP" else value(b)  # GAN-QP: delta alone
    (gradient,) = torch.autograd.grad(goal * len(b), b)
    return value(b).item(), gradient.abs().mean().item()


def test_point_masses(capsys):
    """The paper's central claim: two point masses at a growing distance, under each divergence."""
    distances = [0.25, 0.5, 1.0, 2.0]
    kinds = ["SGAN", "KL", "WGAN-GP", "GAN-QP"]
    rows = {kind: [train_on_point_masses(kind, d) for d in distances] for kind in kinds}
    half = train_on_point_masses("KL", 1.0, steps=750)
    with capsys.disabled():
        print("\n\ndivergence (gradient) at distance " + ", ".join(map(str, distances)))
        for kind, row in rows.items():
            cells = [f"{value:.3f} ({slope:.2g})" for value, slope in row]
            print(f"| {kind} | " + " | ".join(cells) + " |")
        print(f"KL after half of the steps, at 1.0: {half[0]:.0f}")
    for i, d in enumerate(distances):
        divergence, gradient = rows["SGAN"][i]
        assert divergence == pytest.approx(math.log(2), abs=0.001) and gradient < 1e-6
        slope = 1 + d / 20  # of s d - 10 (s - 1)^2 at its maximum: a finite penalty allows s > 1
        assert rows["WGAN-GP"][i] == pytest.approx((d * slope, slope), rel=0.02)
        divergence, gradient = rows["GAN-QP"][i]
        assert divergence == pytest.approx(10 * d / 2, rel=0.01) and 8 < gradient < 11
    assert rows["KL"][2][0] > 1.5 * half[0] > 100  # no finite optimum


# What the author's own scripts (128/gan_gp_l1.py, sic, and 128/gan_qp_l2.py; Keras
# 2.2.4, float64) find from the weights, images and noise of `golden`, for each iteration: d_loss of
# both steps, E T(x_f) of the generator's step, mean |delta| / L1.
GOLDEN = {
    "l1": [
        [-0.384784488725, -0.857829815665, -2.09089122897, 2.77372718788],
        [-0.807083038604, -1.32914935845, -2.66597325619, 6.16070112496],
        [-1.26981758131, -1.5120061295, -2.98387192571, 5.07273424954],
        [-1.21826333805, -1.3614660867, -3.01433622815, 6.18276952809],
        [-1.42040445476, -1.58098464945, -3.04284955155, 5.99881447098],
    ],
    "l2": [
        [-0.399045515755, -0.898921924735, -2.10280957011, 2.76896132246],
        [-0.850067617087, -1.47172381539, -2.75454882684, 6.23773367786],
        [-1.43351900337, -1.6762311124, -3.13099900643, 5.30835420256],
        [-1.38377558592, -1.57234796897, -3.21624793525, 6.52090098131],
        [-1.61383496633, -1.80590411735, -3.28965180597, 6.44048077908],
    ],
}


def golden(i, *shape):
    """Evenly spread numbers in [0, 1) that every numpy, Python 2.7's too, computes to the bit."""
    k = np.arange(1.0, math.prod(shape) + 1)
    numbers = k * (k * 0.6180339887498949 + i * 0.414213562373095) % 1
    return torch.from_numpy(numbers.reshape(shape))


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_training_steps_are_the_authors(metric, capsys):
    """Five iterations from the same weights, images and noise as the author's Keras scripts."""
    G = gan_qp.Generator(16, 16).double()
    D = gan_qp.Discriminator(16).double()
    kernels = [p for net in (G, D) for p in net.parameters() if p.dim() > 1]
    with torch.no_grad():
        for i, weight in enumerate(kernels):
            fans = sum(weight.shape[:2]) * math.prod(weight.shape[2:])
            weight.copy_((2 * golden(i, *weight.shape) - 1) * math.sqrt(6 / fans))
    z = (golden(6, 5, 3, 8, 16) - 0.5) * math.sqrt(12)
    x = (2 * golden(7, 5, 3, 8, 3, 16, 16) - 1) * golden(8, 5, 3, 8, 1, 1, 1)
    args = argparse.Namespace(metric=metric, lam=10.0, power=2, pairwise=False)
    opt_G = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))

    def step(optimizer, loss, t):
        optimizer.param_groups[0]["eps"] = 1e-7 / math.sqrt(1 - 0.999**t)  # where Keras adds it
        gan_qp.update(optimizer, loss)

    rows = []
    for it in range(5):
        row = []
        for i in (0, 1):
            x_fake = G(z[it, i]).detach()
            with torch.no_grad():
                delta = D(x[it, i]) - D(x_fake)
                ratio = delta.abs() / gan_qp.pair_distance(x[it, i], x_fake)
            d_loss, _, _ = gan_qp.discriminator_loss(D, x[it, i], x_fake, args)
            step(opt_D, d_loss, 2 * it + i + 1)
            row.append(d_loss.item())
        g_loss = gan_qp.generator_loss(D, x[it, 2], G(z[it, 2]), args)
        step(opt_G, g_loss, it + 1)
        rows.append([*row, -g_loss.item(), ratio.mean().item()])

    worst = np.abs(np.divide(rows, GOLDEN[metric]) - 1).max()
    with capsys.disabled():
        print(f"\n\n{metric}, iteration 5: here, by the author's script")
        for ours, authors in zip(rows[-1], GOLDEN[metric][-1], strict=True):
            print(f"{ours:.12g}  {authors:.12g}")
        print(f"largest relative difference in five iterations: {worst:.0e}")
    assert worst < 1e-11


# --------------------------------------------------------------------------- networks, shared code


@pytest.mark.parametrize("size", gan_qp.IMG_SIZES)
def test_shapes(size):
    for module in MODULES:
        G = module.Generator(size, 16, 256)
        D = module.Discriminator(size, 256)
        x = G(torch.randn(2, 16))
        assert x.shape == (2, 3, size, size) and x.abs().max() <= 1 and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert D(x).shape == (2,)
    assert gan_qp.Discriminator(size, 256, pairwise=True)(torch.cat([x, x], 1)).shape == (2,)


def test_widths_and_settings():
    assert gan_qp.layer_widths(16) == [64, 128]
    assert gan_qp.layer_widths(128) == [64, 128, 256, 512, 1024]
    assert gan_qp.layer_widths(256) == [64, 128, 256, 512, 1024, 2048]
    assert gan_qp.layer_widths(512) == [32, 64, 128, 256, 512, 1024, 2048]
    assert gan_qp.layer_widths(1024)[-1] == 2048 and len(gan_qp.layer_widths(1024)) == 8
    for size, channels in ((100, None), (1024, 64)):
        with pytest.raises(ValueError):
            gan_qp.Generator(size, max_channels=channels)
    G = gan_qp.Generator(128)
    D = gan_qp.Discriminator(128)
    assert sum(p.numel() for p in G.parameters()) / 1e6 == pytest.approx(19.6, abs=0.1)
    assert sum(p.numel() for p in D.parameters()) / 1e6 == pytest.approx(17.5, abs=0.1)
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for net in (G, D) for m in net.modules() if isinstance(m, kind)]
    assert len(norms) == 5 + 4 and all(m.eps == 1e-3 and m.momentum == 0.01 for m in norms)
    bound = math.sqrt(6 / (25 * (64 + 128)))  # Glorot uniform: within it, and filling it
    assert D.layers[2].weight.abs().max().item() == pytest.approx(bound, rel=1e-3)


def test_scores_in_full_precision_under_autocast():
    for module in MODULES:
        G = module.Generator(16, 8, 16)
        D = module.Discriminator(16, 16)
        with torch.autocast("cpu", torch.bfloat16):
            x = G(torch.randn(4, 8))
            score = D(x)
        assert x.dtype == score.dtype == torch.float32
        assert not torch.equal(score, score.bfloat16().float())


# Top-level definitions in which the scripts differ, and lines of the others that may differ.
OWN = {
    "Discriminator",
    "qp_divergence",
    "score_difference",
    "js_divergence",
    "autograd_gradient",
    "gradient_norm",
    "gradient_penalty",
    "divergence_penalty",
    "constraint_penalty",
    "clip_weights",
    "discriminator_loss",
    "generator_loss",
}
OWN_LINES = [
    "d_loss, divergence, lipschitz = discriminator_loss(",
    'if args.constraint == "clip":',
    "clip_weights(D)",
    "D = Discriminator(",
    *(f'flag("--{name}"' for name in ("d-steps", "lr", "betas")),
    *(f'flag("--{name}"' for name in ("metric", "lam", "power", "pairwise")),
    *(f'flag("--{name}"' for name in ("constraint", "gp-weight", "no-sn")),
    'help="gradient penalty, WGAN-div',
    'help="weight of the gradient penalty',
    'help="plain SGAN',
]


def shared_definitions(script):
    """{name: its lines} of all classes, functions and constants that the scripts share."""
    source = (HERE / f"{script}.py").read_text()
    definitions = {}
    for node in ast.parse(source).body[1:]:  # after the docstring
        name = getattr(node, "name", None) or ast.unparse(node).split("=")[0].strip()
        if name in OWN or name.startswith("from torch.nn.utils.parametri"):
            continue
        lines = [line.strip() for line in ast.get_source_segment(source, node).splitlines()]
        definitions[name] = [line for line in lines if not line.startswith(tuple(OWN_LINES))]
    return definitions


def test_shared_code_is_the_same():
    """diff gan_qp.py wgan_gp.py shows the divergence and nothing else."""
    expected = shared_definitions("gan_qp")
    assert {"train_iteration", "train", "Run", "Generator", "parse_args"} <= expected.keys()
    for script in SCRIPTS[1:]:
        definitions = shared_definitions(script)
        assert list(definitions) == list(expected)
        for name, lines in definitions.items():
            assert lines == expected[name], f"{name} of {script}.py differs from gan_qp.py's"


# ---------------------------------------------------------------- data


def color_profile(space, kind=b"mntr", connection=b"XYZ ", **tags):
    """An ICC profile (bytes) of a colour space such as b"RGB ", with these tags (bytes each)."""
    import struct

    table = struct.pack(">I", len(tags))
    body = b""
    for name, content in tags.items():
        offset = 128 + 4 + 12 * len(tags) + len(body)
        table += struct.pack(">4sII", name.encode(), offset, len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(body)
    layout = ">I4xI4s4s4s12x4s28x"
    header = struct.pack(layout, size, 0x04200000, kind, space, connection, b"acsp")
    return header + fixed_point(0.9642, 1, 0.8249) + bytes(48) + table + body


def fixed_point(*values):
    """Numbers as ICC profiles hold them."""
    return b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0"
SRGB_CURVE += fixed_point(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
GAMMA_CURVE = b"para\0\0\0\0\0\0\0\0" + fixed_point(2.2)


def display_p3(curve=SRGB_CURVE):
    """The colour space of Apple's photographs, or with another curve."""
    columns = {
        "wtpt": (0.9642, 1, 0.8249),
        "rXYZ": (0.51512, 0.24120, -0.00105),
        "gXYZ": (0.29198, 0.69225, 0.04189),
        "bXYZ": (0.15710, 0.06657, 0.78407),
    }
    tags = {name: b"XYZ \0\0\0\0" + fixed_point(*values) for name, values in columns.items()}
    for name in ("rTRC", "gTRC", "bTRC"):
        tags[name] = curve
    return color_profile(b"RGB ", **tags)


def linear_grey():
    return color_profile(b"GRAY", kTRC=b"curv" + bytes(8))


def only_black_ink():
    """A CMYK profile in which cyan, magenta and yellow leave no trace."""
    identity = bytes(range(256))
    corners = b"".join(bytes([255 * (1 - k), 128, 128]) for _ in range(8) for k in (0, 1))
    matrix = fixed_point(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + corners + 3 * identity
    return color_profile(b"CMYK", b"prtr", b"Lab ", A2B0=lut)


def tiff(values, photometric=1, sample_format=1):
    """A grey TIFF (bytes) of the values, an array of any type: unsigned 1, signed 2, float 3."""
    import struct

    height, width = values.shape
    big = values.dtype.byteorder == ">"
    order = ">" if big else "<"
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric, 273: 0}
    tags |= {277: 1, 278: height, 279: values.nbytes, 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the values begin
    content = (b"MM\0*" if big else b"II*\0") + struct.pack(order + "IH", 8, len(tags))
    for tag, value in tags.items():
        content += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    return content + bytes(4) + values.tobytes()


def png(rows, width, depth, kind, **chunks):
    """A PNG (bytes) of rows of raw bytes; kind: 0 grey, 2 RGB; with these chunks besides."""
    import struct
    import zlib

    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    for name, body in {"IHDR": header, **chunks, "IDAT": pixels, "IEND": b""}.items():
        checksum = zlib.crc32(name.encode() + body)
        content += struct.pack(">I4s", len(body), name.encode()) + body
        content += struct.pack(">I", checksum)
    return content


def prepared(folder, size=8):
    """{name: image} of the images of a folder without subfolders, and those skipped."""
    images = data.load_images(folder, size, folder.parent / "cache")
    record = json.loads(Path(images.filename).with_suffix(".json").read_text())
    skipped = dict(record["skipped"])
    names = sorted(file.name for file in folder.iterdir() if file.name not in skipped)
    assert len(names) == len(images)
    return dict(zip(names, images, strict=True)), skipped


def test_kinds_of_images(tmp_path, capsys):
    color = (200, 40, 20)
    red = Image.new("RGB", (48, 32), color)
    black = Image.new("RGB", (48, 32))
    kinds = {  # name -> image, and its mean color
        "a.jpg": (red, color),
        "b.JPEG": (red.convert("CMYK"), color),
        "c.png": (red.convert("P", palette=Image.Palette.ADAPTIVE), color),
        "d.bmp": (red.convert("L"), 86),
        "e.png": (Image.new("RGBA", (48, 32), (*color, 0)), 255),
        "f.png": (Image.fromarray(np.full((32, 48), 32896, np.uint16)), 128),
        "g.tiff": (red, color),
        "h.ppm": (red, color),
        "i.png": (Image.new("RGB", (1, 1), color), color),
        "j.png": (Image.new("RGB", (8, 900), color), color),
        "sub/k.webp": (red, color),
        "\u732b \u00e9.png": (red, color),
        "r.jfif": (red, color),
        "s.TGA": (red, color),
        "t.pgm": (red.convert("L"), 86),
        "u.tif": (red.convert("LAB"), color),
        "v.tif": (Image.new("LA", (48, 32), (0, 127)), 128),
        "w.png": (Image.new("1", (48, 32), 1), 255),
    }
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, (image, _) in kinds.items():
        image.save(folder / name)
    red.save(folder / "l.gif", save_all=True, append_images=[black])
    exif = Image.Exif()
    exif[0x0112] = 6  # stands on its side
    sideways = Image.new("RGB", (64, 64), "white")
    sideways.paste("black", (0, 0, 64, 32))
    sideways.save(folder / "m.jpg", exif=exif)
    (folder / "n.png").write_bytes((folder / "c.png").read_bytes()[:60])  # truncated
    (folder / "o.jpg").write_bytes(b"")
    (folder / "p.jpg").write_bytes(os.urandom(500))
    Image.new("1", (10000, 10000)).save(folder / "q.png")  # over Pillow's limit
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "readme.txt").write_text("no image")

    images = data.load_images(folder, 16, tmp_path / "cache")
    said = capsys.readouterr().err
    assert images.shape == (20, 16, 16, 3) and images.dtype == np.uint8
    assert not images.flags.writeable
    assert "4 skipped" in said
    assert all(f"'{name}'" in said for name in ("n.png", "o.jpg", "p.jpg", "q.png"))
    names = sorted([*kinds, "l.gif", "m.jpg"])
    kinds["l.gif"] = (red, color)  # its first frame
    for name, image in zip(names, images, strict=True):
        if name in kinds:
            expected = np.broadcast_to(kinds[name][1], 3)
            np.testing.assert_allclose(image.mean((0, 1)), expected, atol=12, err_msg=name)
    upright = images[names.index("m.jpg")]
    assert upright[:, 12:].max() < 10 and upright[:, :4].min() > 245  # black is now at the right

    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, f"../{file.relative_to(folder)}")
        archive.writestr("__MACOSX/._a.jpg", b"x")
    again = data.load_images(tmp_path / "images.zip", 16, tmp_path / "cache")
    assert sorted(i.tobytes() for i in images) == sorted(i.tobytes() for i in again)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_numbers_of_bits(tmp_path):
    """8 and 16 bits mean their full range; what has no defined range is skipped with advice."""
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    sixteen = ramp.astype(np.uint16)
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [row.astype(">u2").tobytes() for row in sixteen]
    in_color = [np.repeat(row, 3).astype(">u2").tobytes() for row in sixteen]
    good = {
        "big_endian.tif": tiff(sixteen.astype(">u2")),
        "little_endian.tif": tiff(sixteen),
        "grey.png": png(rows, 8, 16, 0),
        "grey.pgm": b"P5 8 8 65535\n" + b"".join(rows),
        "rgb.png": png(in_color, 8, 16, 2),
        "eight.tif": tiff((ramp / 257).round().astype(np.uint8)),
        "negative.tif": tiff(65535 - sixteen, photometric=0),  # white is zero
        "negative_eight.tif": tiff(255 - (ramp / 257).round().astype(np.uint8), photometric=0),
    }
    one_over = np.full((8, 8), 0.5, np.float32)
    one_over[0, 0] = 1.0001
    bad = {
        "float.tif": tiff(one_over, sample_format=3),
        "not_a_number.tif": tiff(one_over * np.nan, sample_format=3),
        "unsigned32.tif": tiff(np.full((8, 8), 2**31, np.uint32)),
        "big_endian32.tif": tiff(np.full((8, 8), 1000, ">u4")),  # which Pillow cannot open
        "signed32.tif": tiff(np.full((8, 8), 1000, np.int32), sample_format=2),
        "signed16.tif": tiff((sixteen >> 1).astype(np.int16), sample_format=2),
        "signed8.tif": tiff((sixteen >> 9).astype(np.int8), sample_format=2),
    }
    for name, content in {**good, **bad}.items():
        (folder / name).write_bytes(content)

    images, skipped = prepared(folder)
    assert images.keys() == good.keys()
    for name, image in images.items():
        difference = np.abs(image - (ramp / 257)[..., None]).max()
        assert difference <= 1, f"{name}: {difference}"  # Pillow rounds 16-bit RGB down
    assert skipped.keys() == bad.keys()
    for name in bad:
        assert "convert it to 8 or 16 bits" in skipped[name], skipped[name]


def test_transparent_color_of_a_png(tmp_path):
    """PNG gives it at the depth of the file, Pillow the pixels in 8 bits."""
    folder = tmp_path / "images"
    folder.mkdir()
    sixteen = [np.uint16([40000] * 4 + [10000] * 4).astype(">u2").tobytes()] * 8
    in_color = [np.uint16([40000] * 12 + [10000] * 12).astype(">u2").tobytes()] * 8
    color = (10000).to_bytes(2, "big")
    kinds = {
        "grey16.png": (png(sixteen, 8, 16, 0, tRNS=color), 156),
        "rgb16.png": (png(in_color, 8, 16, 2, tRNS=3 * color), 156),
        "grey4.png": (png([b"\x99\x99\x33\x33"] * 8, 8, 4, 0, tRNS=b"\0\3"), 153),
        "grey2.png": (png([b"\xaa\x55"] * 8, 8, 2, 0, tRNS=b"\0\1"), 170),
        "grey1.png": (png([b"\x0f"] * 8, 8, 1, 0, tRNS=b"\0\1"), 0),
    }
    for name, (content, _) in kinds.items():
        (folder / name).write_bytes(content)

    images, _ = prepared(folder)
    for name, image in images.items():
        assert abs(int(image[4, 1, 0]) - kinds[name][1]) <= 1, name
        assert image[4, 6].tolist() == [255, 255, 255], name  # transparent: white behind


def test_color_profiles(tmp_path):
    """A profile is applied, whatever the container and mode; a broken one is ignored."""
    from PIL import ImageCms

    p3 = {"icc_profile": display_p3()}
    srgb = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    photo = Image.new("RGB", (32, 32), (200, 60, 40))
    clear = Image.new("RGBA", (32, 32), (200, 60, 40, 0))
    clear.paste((200, 60, 40, 255), (0, 0, 16, 32))
    grey = Image.new("L", (32, 32), 128)
    cyan = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    right = (217, 42, 23)  # from the curves and matrices of both spaces
    kinds = {  # name -> image, its profile, its color
        "photo.png": (photo, p3, right),
        "gamma.png": (photo, {"icc_profile": display_p3(GAMMA_CURVE)}, (219, 37, 13)),
        "photo.jpg": (photo, {**p3, "quality": 100, "subsampling": 0}, right),
        "large.jpg": (photo.resize((999, 999)), {**p3, "quality": 100, "subsampling": 0}, right),
        "photo.webp": (photo, {**p3, "lossless": True}, right),
        "photo.tif": (photo, p3, right),
        "palette.png": (photo.convert("P", palette=Image.Palette.ADAPTIVE), p3, right),
        "half_clear.png": (clear, p3, right),
        "grey.png": (grey, {"icc_profile": linear_grey()}, (188, 188, 188)),
        "grey.jpg": (grey, {"icc_profile": linear_grey()}, (188, 188, 188)),
        "grey_rgb.jpg": (grey, p3, (128, 128, 128)),
        "inks.jpg": (cyan, {"icc_profile": only_black_ink()}, (255, 255, 255)),
        "inks.tif": (cyan, {"icc_profile": only_black_ink()}, (255, 255, 255)),
        "srgb.png": (photo, srgb, (200, 60, 40)),
        "none.png": (photo, {}, (200, 60, 40)),
        "broken.png": (photo, {"icc_profile": b"broken"}, (200, 60, 40)),
        "torn.jpg": (photo, {"icc_profile": display_p3()[:200], "quality": 100}, (200, 60, 40)),
        "of_grey.png": (photo, {"icc_profile": linear_grey()}, (200, 60, 40)),
    }
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (image, options, _) in kinds.items():
        image.save(folder / name, **options)

    images, skipped = prepared(folder)
    assert not skipped
    for name, image in images.items():
        np.testing.assert_allclose(image[4, 0], kinds[name][2], atol=3, err_msg=name)
    assert images["half_clear.png"][4, 7].tolist() == [255, 255, 255]
    np.testing.assert_allclose(images["photo.png"][4, 1], right, atol=1)


def test_metadata_that_cannot_be_read_costs_no_image(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    folder = tmp_path / "images"
    folder.mkdir()
    rows = [bytes([200, 60, 40] * 8)] * 8
    garbage = b"II*\0\xff\xff\xff\xff garbage"
    (folder / "exif.png").write_bytes(png(rows, 8, 8, 2, eXIf=garbage))
    (folder / "short.png").write_bytes(png(rows, 8, 8, 2, eXIf=b"g"))
    (folder / "profile.png").write_bytes(png(rows, 8, 8, 2, iCCP=b"name\0\0not compressed"))
    photo = Image.new("RGB", (8, 8), (200, 60, 40))
    photo.save(folder / "exif.jpg", quality=100, exif=b"Exif\0\0" + garbage)
    photo.save(folder / "exif.webp", lossless=True, exif=garbage)
    long_text = PngInfo()
    long_text.add_text("workflow", 2_000_000 * "x", zip=True)
    photo.save(folder / "text.png", pnginfo=long_text)
    images, skipped = prepared(folder)
    assert not skipped and len(images) == 6
    for name, image in images.items():
        np.testing.assert_allclose(image[4, 4], (200, 60, 40), atol=3, err_msg=name)


def test_metadata_that_cannot_be_written_again_turns_an_image(tmp_path, monkeypatch):
    photo = Image.new("RGB", (8, 8), "white")
    photo.paste("black", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo.save(tmp_path / "a.jpg", quality=100, exif=exif)

    def fail(*_):
        raise ValueError("a damaged tag")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    image = prepared(tmp_path)[0]["a.jpg"]
    assert image[:3].min() > 245 and image[5:].max() < 10


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"],
)
def test_every_mode_of_a_pil_image(mode):
    by_way = {"La": "LA", "PA": "LA", "RGBa": "RGBA", "LAB": "RGB"}.get(mode, mode)
    white = Image.new("RGB", (20, 10), "white").convert("L" if by_way in "LA" else "RGB")
    image = white.convert(by_way).convert(mode)
    small = np.asarray(data.to_square(image, 8))
    assert small.shape == (8, 8, 3) and small.min() >= 254


def test_links_and_files_that_are_no_images(tmp_path, capsys):
    """Links are followed and each real folder is taken once; all else is counted in one line."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    beside = tmp_path / "beside.png"
    for place in (folder / "a.png", folder / "sub" / "b.png", elsewhere / "c.PNG", beside):
        make_image().save(place)
    try:
        (folder / "self").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    (folder / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "out").symlink_to(elsewhere, target_is_directory=True)
    (folder / "sub" / "again").symlink_to(elsewhere, target_is_directory=True)
    (folder / "gone.png").symlink_to(folder / "missing.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    for name in ("d.heic", "e.heic", "f.txt", "g.JPG_large", "h", ".i.png", "j.pdf", "k.h5"):
        (folder / name).write_bytes(b"no image")
    (folder / "l.zip").write_bytes(b"PK")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "m.jpg")

    images = data.load_images(folder, 8, tmp_path / "cache")
    said = capsys.readouterr().err
    assert len(images) == 3, said
    assert "0 skipped" in said
    count = 12 if hasattr(os, "mkfifo") else 11
    assert f"{count} other files: " in said and "2 .heic" in said
    assert ".zip in a folder is not opened" in said
    assert len(said.splitlines()) <= 4, said


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "photos" / "shut").mkdir(parents=True)
    make_image().save(tmp_path / "photos" / "a.png")
    scandir = os.scandir

    def guarded(path="."):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert len(data.load_images(tmp_path / "photos", 8, tmp_path / "cache")) == 1
    assert "shut' cannot be read (Permission denied)" in capsys.readouterr().err


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    make_image().save(folder / "a.png")
    try:
        (folder / "caf\udce9.png").write_bytes(b"broken")
        (folder / "b.caf\udce9").write_bytes(b"broken")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes only UTF-8")
    assert len(data.load_images(folder, 8, tmp_path / "cache")) == 1
    assert "caf\\udce9.png" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_in_a_zip(tmp_path, capsys):
    """Odd names are only names, and one name twice is two images."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for level, name in ((10, "a.png"), (90, "a.png"), (170, "/etc/b.png"), (250, "../c.png")):
            with archive.open(name, "w", force_zip64=True) as file:
                Image.new("L", (8, 8), level).save(file, "PNG")
        archive.writestr("notes.txt", "no image")
        archive.writestr("__MACOSX/._a.png", "no image")
    images = data.load_images(tmp_path / "images.zip", 8, tmp_path / "cache")
    assert sorted(images[:, 4, 4, 0].tolist()) == [10, 90, 170, 250]
    assert "2 other files" in capsys.readouterr().err


def test_sources_that_do_not_work(tmp_path, cli):
    (tmp_path / "torn.zip").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.heic").write_bytes(b"no format of Pillow's")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("a.png", b"x" * 50)
    locked = (tmp_path / "locked.zip").read_bytes()
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # set the flag that says: encrypted
        at = locked.index(mark) + offset
        locked = locked[:at] + b"\1" + locked[at + 1 :]
    (tmp_path / "locked.zip").write_bytes(locked)
    for source, word in (
        ("synthetic:0", "synthetic:N"),
        ("synthetic:\u00b2", "synthetic:N"),
        ("torchvision:Nothing", "torchvision:Nothing"),
        (tmp_path / "none", "a folder"),
        (tmp_path / "torn.zip", "zip"),
        (tmp_path / "empty", "1 .heic"),
        (tmp_path / "bad", "no readable image"),
        (tmp_path / "locked.zip", "encrypted"),
        ("", "empty"),
        ("~nobody-of-this-name/photos", "home"),
    ):
        refused(cli("data", source, "--img-size", 16), word)
        refused(cli("gan_qp", *TINY, "--data", source, "--out", tmp_path / "run"), word)
    assert not any((tmp_path / "run").glob("[!.]*"))  # but for the lock
    refused(cli("data", "synthetic", "--img-size", "0"), "--img-size")
    refused(cli("data", "synthetic", "--img-size", "large"), "--img-size")
    refused(cli("data", "synthetic:2", "--cache-dir", ""), "--cache-dir", "empty")


def test_a_home_directory_and_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "photos").mkdir()
    make_image().save(tmp_path / "photos" / "a.png")
    assert len(data.load_images("~/photos", 8, "~/cache")) == 1
    assert list((tmp_path / "cache").glob("*.npy"))

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(OSError, match="home directory is not known"):
        data.load_images("synthetic:1", 8)


@pytest.mark.parametrize("item", [torch.zeros(3, 8, 8), "a text"])
def test_torchvision_sets_without_images(item, tmp_path, cli, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, "Strange", lambda: [(item, 0)], raising=False)
    refused(cli("data", "torchvision:Strange"), type(item).__name__, "not images")


def test_preview_and_torchvision(cli):
    code, out, err = cli("data", "torchvision:FakeData", "--img-size", 16)
    assert code == 0 and "1,000 images" in err
    preview = Image.open(out.split("preview ")[1].strip())
    assert preview.size == (8 * 18 + 2, 8 * 18 + 2)


def test_synthetic_faces(cache):
    a = data.load_images("synthetic:24", 32, cache)
    b = np.stack([np.asarray(data.draw_face(i, 32)) for i in range(24)])
    assert np.array_equal(a, b) and len({image.tobytes() for image in a}) == 24
    assert np.asarray(data.draw_face(3, 100)).shape == (100, 100, 3)


def test_too_little_space(cli, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=5_000_000))
    result = cli("data", "synthetic:2001", "--img-size", 32)
    refused(result, "0.006 GB", "0.005 GB", "--cache-dir")


def test_a_cache_folder_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    for place in ("file", "file/below"):
        with pytest.raises(OSError, match="cannot be used"):
            data.load_images("synthetic:1", 8, tmp_path / place)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lock.sqlite").write_bytes(b"no lock" * 1000)
    with pytest.raises(OSError, match="cannot be locked"):
        data.load_images("synthetic:1", 8, tmp_path / "cache")


def test_without_fcntl(tmp_path):
    """As on Windows: everything can be imported, and a preparation runs."""
    lines = [
        "import sys",
        "sys.modules['fcntl'] = None",
        f"sys.path.insert(0, {str(HERE)!r})",
        "import data, fid, gan_qp, sgan_sn, wgan_gp",
        f"print(len(data.load_images('synthetic:9', 16, {str(tmp_path)!r})))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout == "9\n", done.stderr


def test_without_color_management(tmp_path, monkeypatch):
    """Some builds of Pillow lack LittleCMS: then profiles are ignored."""
    from PIL import ImageCms

    def missing(*_):
        raise ImportError("The _imagingcms C module is not installed")

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    data.srgb_transform.cache_clear()
    folder = tmp_path / "images"
    folder.mkdir()
    photo = Image.new("RGB", (8, 8), (200, 60, 40))
    photo.save(folder / "a.png", icc_profile=display_p3())
    images, _ = prepared(folder)
    data.srgb_transform.cache_clear()
    assert images["a.png"][4, 4].tolist() == [200, 60, 40]


def test_a_source_that_changes(tmp_path):
    """A changed file is prepared anew; one that vanishes during preparation is skipped."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        make_image(i).save(folder / f"{i}.png")
    before = data.load_images(folder, 8, tmp_path / "cache")
    assert data.load_images(folder, 8, tmp_path / "cache").filename == before.filename
    time.sleep(0.01)
    make_image(9).save(folder / "0.png")
    after = data.load_images(folder, 8, tmp_path / "cache")
    assert not np.array_equal(before, after) and np.array_equal(before[1:], after[1:])

    class Shrinking(data.Folder):
        def read(self, i, size):
            (folder / "2.png").unlink(missing_ok=True)
            return super().read(i, size)

    path = tmp_path / "cache" / "shrinking.npy"
    data.prepare(Shrinking(folder), 8, path, quiet=True)
    assert np.array_equal(np.load(path), after[:2])


def test_a_disk_that_fails_for_a_moment_costs_no_image(tmp_path, cli, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        make_image(i).save(photos / f"{i}.png")

    def fail(self, i, size):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(data.Folder, "read", fail)
        flags = ["--data", photos, "--out", tmp_path / "run"]
        refused(cli("gan_qp", *TINY, *flags), "0.png", "Input/output error", "try again")
    assert len(prepared(photos)[0]) == 2


def test_fingerprint_is_of_the_images_alone(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        make_image(i).save(folder / f"{i}.png")
    first = data.fingerprint(data.load_images(folder, 8, tmp_path / "cache"))
    assert data.fingerprint(data.load_images(f"{folder}/", 8, tmp_path / "cache")) == first
    moved = folder.rename(tmp_path / "moved")
    assert data.fingerprint(data.load_images(moved, 8, tmp_path / "other")) == first
    folder.mkdir()
    for i in range(2):
        make_image(i + 2).save(folder / f"{i}.png")
    assert data.fingerprint(data.load_images(folder, 8, tmp_path / "cache")) != first


def test_batches():
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    images[:, :, 0] = 255
    batches = data.Batches(images, 4, "cpu", seed=3)

    def label(x):
        return ((x[:, 0, 0, 1] + 1) * 127.5).round().int().tolist()

    sequence = sum((label(batches[k]) for k in range(10)), [])
    for epoch in range(4):
        assert sorted(sequence[10 * epoch : 10 * epoch + 10]) == list(range(10))  # no repeats
    assert sequence[:10] != sequence[10:20]
    assert label(data.Batches(images, 4, "cpu", seed=3)[7]) == sequence[28:32]  # seekable
    assert label(data.Batches(images, 4, "cpu", seed=4)[0]) != sequence[:4]
    several_epochs = label(data.Batches(images, 40, "cpu", seed=3)[0])
    assert several_epochs == sequence

    x = batches[0]
    assert x.shape == (4, 3, 4, 4) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x[:, :, :, 0].eq(1).all() and x.min() >= -1

    options = {"seed": 3, "flip": True}
    flipping = data.Batches(images, 4, "cpu", **options)
    halves = [data.Batches(images, 4, "cpu", **options, rank=rank, world=2)[5] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), flipping[5])
    assert 8 < sum(bool(flipping[k][0, 0, 0, -1] == 1) for k in range(40)) < 32

    streamed = data.Batches(images, 4, "cpu", seed=3)
    streamed.fetch = streamed.from_thread
    for k in (0, 1, 2, 9, 3):
        assert torch.equal(streamed[k], batches[k])
    with pytest.raises(ValueError):
        data.Batches(images, 5, "cpu", world=2)


def test_batches_are_contiguous_on_apple():
    """Simulated: a device called mps, whose tensors are the CPU's."""
    images = np.arange(8 * 4 * 4 * 3, dtype=np.uint8).reshape(8, 4, 4, 3)
    expected = data.Batches(images, 4, "cpu")
    batches = data.Batches(images, 4, "cpu")
    batches.device = torch.device("mps")
    batches.fetch = expected.fetch
    assert batches[1].is_contiguous() and torch.equal(batches[1], expected[1])


def test_preparation_killed_and_twice_at_once(tmp_path):
    flags = ["synthetic:600", "--img-size", 64, "--cache-dir", tmp_path]
    for _ in range(2):
        process = command("data", *flags)
        # until it is in the midst of it
        while not any(file.stat().st_size > 10**6 for file in tmp_path.glob("*.tmp")):
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
        process.wait()
        assert not list(tmp_path.glob("*.npy")) and len(list(tmp_path.glob("*.tmp"))) == 1
    both = [command("data", *flags) for _ in range(2)]
    ends = [process.wait() for process in both]
    assert ends == [0, 0], [process.stdout.read() for process in both]
    assert len(list(tmp_path.glob("*.npy"))) == 1 and not list(tmp_path.glob("*.tmp"))


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "new" / "run.lock"
    lines = ["import sys", f"sys.path.insert(0, {str(HERE)!r})", "import data, time"]
    lines += [f"with data.file_lock({str(path)!r}):", "    print('held'); time.sleep(60)"]
    process = start([sys.executable, "-c", "\n".join(lines)])
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="another process"):
        with data.file_lock(path, wait=False):
            pass
    process.kill()
    process.wait()
    for wait in (False, True):
        with data.file_lock(path, wait=wait):
            pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(ValueError), data.atomic_write(path) as file:
        file.write(b"half of")
        raise ValueError("interrupted")
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a.bin"]

    # As on Windows while somebody else reads the file: refused at first.
    refusals = [PermissionError("in use")] * 3
    rename = os.replace

    def replace(*names):
        if refusals:
            raise refusals.pop()
        rename(*names)

    monkeypatch.setattr(os, "replace", replace)
    with data.atomic_write(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after" and not refusals

    refusals += [PermissionError("in use")] * 1000
    with pytest.raises(OSError, match="a.bin could not be written .in use."):
        with data.atomic_write(path) as file:
            file.write(b"later")
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("extension", ["png", "PNG", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_grids_of_every_format(extension, tmp_path):
    path = tmp_path / f"grid.{extension}"
    assert data.is_picture_name(path)
    images = torch.full((6, 32, 32, 3), 200, dtype=torch.uint8)
    data.save_grid(images, path, 3)
    with Image.open(path) as grid:
        assert grid.size == (3 * 34 + 2, 2 * 34 + 2)
        assert abs(np.asarray(grid.convert("RGB"))[18, 18] - 200.0).max() < 4
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "name",
    ["samples", "a.b/samples", "x.txt", "x.heic", "x.icns", "x.xbm", "x.h5", "x.mpg", "x.tmp", ""],
)
def test_names_that_are_no_pictures(name):
    assert not data.is_picture_name(name)


def test_animation_leaves_out_what_is_no_picture(tmp_path):
    samples = tmp_path / "samples"
    data.save_animation(samples, tmp_path / "progress.gif")  # no such folder
    samples.mkdir()
    (samples / "000001.png").write_bytes(b"")
    data.save_animation(samples, tmp_path / "progress.gif")
    assert not (tmp_path / "progress.gif").exists()

    (samples / "000002.png").write_bytes(b"broken")
    (samples / "holiday.png").write_bytes(b"stray")
    (samples / "000003.png").mkdir()
    for i in range(4, 7):
        make_image(i, size=(80, 80)).save(samples / f"{i:06d}.png")
    make_image(7, size=(700, 40)).save(samples / "000007.png")
    data.save_animation(samples, tmp_path / "progress.gif")
    with Image.open(tmp_path / "progress.gif") as animation:
        assert animation.n_frames == 4


# --------------------------------------------------------------------------- runs


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_its_samples_and_its_resumption(script, cli, tmp_path):
    flags = [*TINY, "--log-every", 2, "--sample-every", 3, "--save-every", 4, "--flip"]
    flags += ["--ema", 0.9]
    whole = tmp_path / "whole"
    split = tmp_path / "split"
    code, out, _ = cli(script, *flags, "--iters", 7, "--out", whole)
    assert code == 0 and "done" in out and str(whole) in out
    assert "12 images" in out and "cpu" in out and "fp32" in out
    files = {file.name for file in whole.iterdir() if file.name[0] != "."}
    assert files == {"args.json", "log.jsonl", "real.png", "samples", "last.pt", "progress.gif"}
    samples = sorted(file.name for file in (whole / "samples").iterdir())
    assert samples == ["000003.png", "000006.png", "000007.png"]
    assert [row["iter"] for row in log_of(whole)] == [1, 2, 4, 6, 7]
    fields = {"iter", "d_loss", "g_loss", "divergence", "lipschitz", "img_per_sec", "sec"}
    assert set(log_of(whole)[0]) == fields
    args = json.loads((whole / "args.json").read_text())
    assert args["img_size"] == 16 and {"python", "torch", "torchvision", "device_name"} <= set(args)
    assert Image.open(whole / "samples" / "000007.png").size == (9 * 18 + 2, 9 * 18 + 2)

    assert cli(script, *flags, "--iters", 5, "--out", split)[0] == 0
    with open(split / "log.jsonl", "a") as file:
        file.write('{"iter": 6, "d_lo')  # torn
    assert cli(script, *flags, "--iters", 7, "--out", split, "--resume")[0] == 0
    assert cli(script, *flags, "--iters", 7, "--out", split, "--resume")[0] == 0  # at its end
    refused(cli(script, *flags, "--iters", 6, "--out", split, "--resume"), "iteration 7", "--iters")
    assert_same(weights(whole / "last.pt"), weights(split / "last.pt"))
    assert [row["iter"] for row in log_of(split)] == [1, 2, 4, 5, 6, 7]

    sampling = ["--sample", whole / "last.pt", "--device", "cpu"]
    for name in ("x.png", "x.jpg"):  # any extension of a picture means a grid
        assert cli(script, *sampling, "--out", tmp_path / name, "--num-samples", 5)[0] == 0
        assert Image.open(tmp_path / name).size == (3 * 18 + 2, 2 * 18 + 2)
    assert cli(script, *sampling, "--out", tmp_path / "y", "--num-samples", 3)[0] == 0
    sizes = [Image.open(tmp_path / "y" / f"0000{i}.png").size for i in range(3)]
    assert sizes == [(16, 16)] * 3
    for name, *flag in (("plain.png",), ("between.png", "--interpolate")):
        out = tmp_path / name
        assert cli(script, *sampling, "--out", out, "--num-samples", 16, *flag)[0] == 0
    plain = np.asarray(Image.open(tmp_path / "plain.png"))
    between = np.asarray(Image.open(tmp_path / "between.png"))
    assert between.shape == (2 * 18 + 2, 8 * 18 + 2, 3)
    for row in (0, 1):  # which begin at the noise of the first images
        first = plain[:18, 18 * row : 18 * row + 18]
        np.testing.assert_allclose(between[18 * row : 18 * row + 18, :18], first, atol=1)
    refused(cli(script, *sampling, "--out", tmp_path / "x.png"), "--out")

    other = SCRIPTS[SCRIPTS.index(script) - 1]
    refused(cli(other, *sampling, "--out", tmp_path / "w.png"), f"{script}.py")
    refused(cli(script, *flags, "--out", whole), "--resume")
    for flag, value in (("--seed", 5), ("--img-size", 32), ("--batch-size", 6), ("--lr", 1e-3)):
        result = cli(script, *flags, flag, value, "--out", whole, "--resume")
        refused(result, flag, str(value), "does not match")


@pytest.mark.parametrize(
    "script, flags",
    [
        ("gan_qp", ["--pairwise"]),
        ("gan_qp", ["--metric", "l2", "--power", "4"]),
        ("wgan_gp", ["--constraint", "div"]),
        ("wgan_gp", ["--constraint", "sn"]),
        ("wgan_gp", ["--constraint", "clip"]),
        ("wgan_gp", ["--precision", "bf16"]),
        ("sgan_sn", ["--no-sn", "--precision", "bf16"]),
    ],
)
def test_variants(script, flags, cli, tmp_path):
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers do
    assert cli(script, *TINY, *flags, "--iters", 2, "--out", tmp_path)[0] == 0
    assert torch.get_float32_matmul_precision() == "highest"  # fp32 means fp32
    cudnn = torch.backends.cudnn
    assert cudnn.conv.fp32_precision == "ieee" if hasattr(cudnn, "conv") else not cudnn.allow_tf32
    if "clip" in flags:
        largest = max(p.abs().max() for p in weights(tmp_path / "last.pt")["D"].values())
        assert largest == pytest.approx(0.01)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loop_does_not_wait_for_the_device(script, cli, tmp_path):
    """A program waits for a GPU when it reads a number from a tensor: only at logs and saves."""

    class Reads(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    counts = []
    for iters in (3, 9):
        with Reads() as reads:
            out = tmp_path / str(iters)
            assert cli(script, *TINY, "--iters", iters, "--out", out)[0] == 0
        counts.append(reads.n)
    assert counts[0] == counts[1] > 0


def test_average_of_the_generator(cli, tmp_path):
    """All steps so far with weights 1, 0.9, 0.81, ...: the initial weights have no share."""
    for iters in (1, 2):
        out = tmp_path / str(iters)
        assert cli("gan_qp", *TINY, "--ema", 0.9, "--iters", iters, "--out", out)[0] == 0
    one = weights(tmp_path / "1" / "last.pt")
    two = weights(tmp_path / "2" / "last.pt")
    name = "layers.0.weight"
    torch.testing.assert_close(one["G_ema"][name], one["G"][name])
    expected = (0.9 * one["G"][name] + two["G"][name]) / 1.9
    torch.testing.assert_close(two["G_ema"][name], expected)

    G = gan_qp.Generator(16, 8, 8)
    G.load_state_dict(two["G_ema"])
    torch.manual_seed(0)
    features = G.linear(torch.randn(10**5, 8))  # batch norm has the averaged weights' statistics
    torch.testing.assert_close(G.norm.running_mean, features.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(G.norm.running_var, features.var(0), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--img-size", "100"], ["--img-size", "128"]),
        (["--iters", "0"], ["--iters"]),
        (["--lr", "nan"], ["--lr"]),
        (["--lam", "0"], ["--lam"]),
        (["--ema", "1.5"], ["--ema"]),
        (["--betas", "0.5", "1"], ["--betas"]),
        (["--batch-size", "1"], ["--batch-size"]),
        (["--seed", "-1"], ["--seed"]),
        (["--z-dim", "x"], ["--z-dim"]),
        (["--max-channels", "4", "--img-size", "512"], ["max_channels", "64"]),
        (["--iter", "5"], ["--iter"]),
        (["--data", ""], ["empty"]),
        (["--out", ""], ["--out"]),
        (["--sample", ""], ["--sample"]),
        (["--device", "cuda:99"], ["--device", "cpu"]),
        (["--sample", "nothing.pt"], ["nothing.pt"]),
        (["--fid-every", "1", "--fid-weights", "nothing.pth"], ["nothing.pth", "--fid-weights"]),
    ],
)
def test_refused_flags(flags, words, cli, tmp_path):
    out = tmp_path / "run"
    refused(cli("gan_qp", *TINY, "--out", out, *flags), *words)
    assert not any(out.glob("[!.]*"))


def test_paths_that_start_with_the_home_folder(cli, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert cli("gan_qp", *TINY, "--iters", 1, "--out", "~/run")[0] == 0
    assert cli("gan_qp", "--sample", "~/run/last.pt", "--out", "~/x.png", "--device", "cpu")[0] == 0
    assert (tmp_path / "x.png").exists()


def test_places_that_cannot_be_written(cli, tmp_path):
    """Told before the work begins, not after it."""
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "run"):
        refused(cli("gan_qp", *TINY, "--iters", 1, "--out", out), "file")
    assert cli("gan_qp", *TINY, "--iters", 1, "--out", tmp_path / "run")[0] == 0
    sampling = ["--sample", tmp_path / "run" / "last.pt", "--device", "cpu", "--out"]
    for out in (file, file / "x.png"):
        refused(cli("gan_qp", *sampling, out), "file")
    assert file.read_text() == "mine"


def test_out_of_memory_and_another_try(cli, tmp_path):
    out = ["--out", tmp_path / "run"]
    large = ["--img-size", 1024, "--max-channels", 128, "--batch-size", 10**5]
    refused(cli("gan_qp", *TINY, *large, *out), "--batch-size")
    assert cli("gan_qp", *TINY, "--iters", 1, *out)[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "No valid execution plans built.",
    ],
)
def test_words_for_out_of_memory(words, cli, monkeypatch, tmp_path):
    """One line for what NVIDIA's libraries say when a GPU is full."""

    def load_images(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr(data, "load_images", load_images)
    refused(cli("gan_qp", *TINY, "--out", tmp_path / "run"), "--batch-size")


def test_fewer_gpus_than_processes(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    flags = ["--device", "cuda", "--out", tmp_path / "run"]
    refused(cli("gan_qp", *TINY, *flags), "--nproc-per-node")


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "2"), ("RANK", "1"), ("RANK", "x")])
def test_a_variable_of_torchrun_without_torchrun(name, value, cli, monkeypatch, tmp_path):
    monkeypatch.setenv(name, value)
    code, _, err = cli("gan_qp", *TINY, "--out", tmp_path / "run")
    assert code == 2 and "torchrun" in err and "Traceback" not in err


def test_every_process_tells_its_own_error(cli, monkeypatch, tmp_path):
    """With its number; where all fail alike, the first alone speaks."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    flags = [*TINY, "--out", tmp_path / "run"]
    code, _, err = cli("gan_qp", *flags, "--device", "mars")
    assert code == 2 and err.startswith("gan_qp.py, process 1: --device mars")
    code, _, err = cli("gan_qp", *flags, "--lam", 0)
    assert code == 2 and err == ""
    for name in ("RANK", "WORLD_SIZE"):  # several runs that a queue started, each on its own
        monkeypatch.delenv(name)
    refused(cli("gan_qp", *flags, "--lam", 0), "--lam")


def test_grids_of_large_images(cli, tmp_path):
    flags = ["--data", "synthetic:16", "--img-size", 512, "--max-channels", 64, "--batch-size", 2]
    code, out, _ = cli("gan_qp", *TINY, *flags, "--iters", 1, "--out", tmp_path / "run")
    assert code == 0 and out.startswith("training on the CPU")
    for picture in ("real.png", "samples/000001.png"):
        assert Image.open(tmp_path / "run" / picture).size == (4 * 514 + 2, 4 * 514 + 2)


def test_precision_and_layout_follow_the_device():
    assert gan_qp.choose_precision("mps") == "fp32"  # whatever the CPU beside it can do
    assert gan_qp.memory_format(torch.device("mps")) == torch.contiguous_format
    assert gan_qp.memory_format(torch.device("cuda")) == torch.channels_last


def test_a_loss_that_is_not_finite(cli, tmp_path):
    run = tmp_path / "run"
    assert cli("gan_qp", *TINY, "--iters", 4, "--out", run)[0] == 0
    state = weights(run / "last.pt")
    state["D"]["linear.weight"].fill_(3e38)  # the next loss overflows
    torch.save(state, run / "last.pt")
    before = (run / "last.pt").read_bytes()
    result = cli("gan_qp", *TINY, "--iters", 9, "--out", run, "--resume")
    refused(result, "iteration 5", "last.pt")
    assert (run / "last.pt").read_bytes() == before


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran-code",)


def test_checkpoints_from_strangers(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"script": "gan_qp", "iter": 1, "args": Bomb()}, "bomb.pt")
    assert cli("gan_qp", *TINY, "--iters", 1, "--out", "run")[0] == 0
    whole = weights("run/last.pt")
    Path("torn.pt").write_bytes(Path("run/last.pt").read_bytes()[:5000])
    Path("text.pt").write_text("hello")
    torch.save([1, 2], "list.pt")
    torch.save({"script": "gan_qp", "iter": 1, "args": {"img_size": 16}}, "empty.pt")
    torch.save({**whole, "G_ema": {}}, "unfit.pt")
    damaged = ["bomb.pt", "torn.pt", "text.pt", "list.pt", "empty.pt", "unfit.pt"]
    for name in damaged:
        result = cli("gan_qp", "--sample", name, "--out", "x.png", "--device", "cpu")
        refused(result, name)

    for part in ("opt_D", "log", "images"):
        lacking = f"without-{part}.pt"
        torch.save({key: value for key, value in whole.items() if key != part}, lacking)
        damaged.append(lacking)
    for name in damaged:
        shutil.copy(name, "run/last.pt")
        result = cli("gan_qp", *TINY, "--iters", 2, "--out", "run", "--resume")
        refused(result, "last.pt")
        assert Path("run/last.pt").read_bytes() == Path(name).read_bytes()
    refused(cli("fid", "run", "run", "--weights", "bomb.pt"), "bomb.pt")
    assert not Path("ran-code").exists()


def test_a_whole_checkpoint_for_which_there_is_no_memory(cli, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", fail)
    flags = ["--sample", "last.pt", "--out", tmp_path / "x.png", "--device", "cpu"]
    refused(cli("gan_qp", *flags), "out of memory", "--num-samples")


def test_resume_compares_the_images_and_not_their_place(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(4):
        make_image(i).save(f"photos/{i}.png")
    flags = [*TINY, "--out", "run", "--resume", "--iters"]
    code, out, _ = cli("gan_qp", *flags, 1, "--data", "photos")
    assert code == 0 and "no run" in out and "last.pt" in out  # there is nothing to continue yet
    for i, name in enumerate(("photos/", "./photos", str(tmp_path / "photos"))):
        assert cli("gan_qp", *flags, 2 + i, "--data", name)[0] == 0
    Path("photos").rename("moved")
    assert cli("gan_qp", *flags, 5, "--data", "moved")[0] == 0
    make_image(9).save("moved/0.png")
    refused(cli("gan_qp", *flags, 6, "--data", "moved"), "moved", "images")
    assert weights("run/last.pt")["iter"] == 5


def test_results_without_last_pt_are_not_overwritten(cli, tmp_path):
    run = tmp_path / "run"
    assert cli("gan_qp", *TINY, "--iters", 1, "--out", run)[0] == 0
    (run / "last.pt").unlink()
    before = (run / "samples" / "000001.png").read_bytes()
    for flag in ([], ["--resume"]):
        refused(cli("gan_qp", *TINY, "--iters", 1, "--seed", 1, "--out", run, *flag), "last.pt")
    assert (run / "samples" / "000001.png").read_bytes() == before
    shutil.rmtree(run / "samples")  # progress.gif and the log are left
    refused(cli("gan_qp", *TINY, "--iters", 1, "--out", run), "last.pt")


def test_strange_files_among_the_samples(cli, tmp_path):
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    assert cli("gan_qp", *TINY, "--iters", 1, "--out", tmp_path / "run")[0] == 0
    for stray in ("notes.png", "000002.png"):
        (samples / stray).write_bytes(b"")
    make_image().save(samples / "a cat.png")
    flags = [*TINY, "--out", tmp_path / "run", "--resume", "--iters"]
    assert cli("gan_qp", *flags, 2)[0] == 0
    shutil.rmtree(samples)
    assert cli("gan_qp", *flags, 2)[0] == 0


def start_run(cache, out, **options):
    """A run of its own process that would go on for ever -> the process, after its first save."""
    flags = [*TINY, "--cache-dir", cache, "--iters", 10**6, "--log-every", 5, "--out", out]
    process = command("gan_qp", *flags, **options)
    while not (out / "last.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_continue(name, cache, tmp_path):
    if not hasattr(signal, name):
        pytest.skip("not on this system")
    process = start_run(cache, tmp_path / "run")
    process.send_signal(getattr(signal, name))
    said = process.communicate()[0]
    assert process.returncode == 0 and "--resume" in said, said
    stopped = int(re.search(r"saved at iteration (\d+)", said)[1])
    assert weights(tmp_path / "run" / "last.pt")["iter"] == stopped
    assert log_of(tmp_path / "run")[-1]["iter"] == stopped


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_nohup_goes_on(cache, tmp_path):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start_run(cache, tmp_path / "run", **ignore)
    process.send_signal(signal.SIGHUP)
    reached = log_of(tmp_path / "run")[-1]["iter"]
    while log_of(tmp_path / "run")[-1]["iter"] < reached + 10:
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    assert process.wait() == 0


def test_output_that_nobody_reads_saves_and_ends(cache, tmp_path):
    """As with `| head`, and with a full disk behind `>`."""
    process = start_run(cache, tmp_path / "closed", stderr=subprocess.DEVNULL)
    process.stdout.close()
    assert process.wait(60) == 0
    outs = [tmp_path / "closed"]
    if Path("/dev/full").exists():
        outs.append(tmp_path / "full")
        with open("/dev/full", "w") as full:
            flags = [*TINY, "--cache-dir", cache, "--iters", 10**6, "--out", outs[-1]]
            process = command("gan_qp", *flags, stdout=full, stderr=subprocess.PIPE)
            assert process.wait(60) == 0, process.stderr.read()
    for out in outs:
        assert weights(out / "last.pt")["iter"] == log_of(out)[-1]["iter"] < 10**6


def test_a_second_run_in_one_folder_is_refused(cli, cache, tmp_path):
    """While the first one trains; a run that was killed blocks nobody."""
    out = tmp_path / "run"
    process = start_run(cache, out)
    for flag in ([], ["--resume"]):
        refused(cli("gan_qp", *TINY, "--iters", 1, "--out", out, *flag), "in use")
    process.kill()
    process.communicate()
    iters = weights(out / "last.pt")["iter"] + 1
    assert cli("gan_qp", *TINY, "--iters", iters, "--out", out, "--resume")[0] == 0


def test_sigkill_loses_nothing(cli, cache, tmp_path):
    flags = [*TINY, "--iters", 100, "--log-every", 1, "--sample-every", 50, "--save-every", 4]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `command` has, or the sums would differ in their last bits
    assert cli("gan_qp", *flags, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    rng = np.random.default_rng(0)
    for resume in ([], ["--resume"]):
        process = command("gan_qp", *flags, "--out", out, "--cache-dir", cache, *resume)
        lines = (line for line in process.stdout if line.startswith("iter "))
        next(lines)
        next(lines)  # the first save is over; now let it train for a random while
        time.sleep(rng.uniform(0.02, 0.2))
        process.kill()
        process.communicate()
        assert 1 <= weights(out / "last.pt")["iter"] < 100
    assert cli("gan_qp", *flags, "--out", out, "--resume")[0] == 0
    torch.set_num_threads(threads)
    assert_same(weights(tmp_path / "whole" / "last.pt"), weights(out / "last.pt"))
    assert [row["iter"] for row in log_of(out)] == list(range(1, 101))
    assert (out / "progress.gif").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on files")
def test_disk_full(cli, cache, tmp_path):
    run = tmp_path / "run"
    flags = [*TINY, "--max-channels", 64, "--cache-dir", cache, "--out", run]
    assert cli("gan_qp", *flags, "--iters", 1)[0] == 0
    before = (run / "last.pt").read_bytes()

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    process = command("gan_qp", *flags, "--iters", 2, "--resume", preexec_fn=limit)
    said = process.communicate()[0]
    assert process.returncode == 2 and "last.pt could not be written" in said, said
    assert "Traceback" not in said
    assert (run / "last.pt").read_bytes() == before and not (run / "last.pt.tmp").exists()

    flags = ["synthetic:900", "--img-size", 32, "--cache-dir", tmp_path / "new"]
    process = command("data", *flags, preexec_fn=limit)
    said = process.communicate()[0]
    assert process.returncode == 2 and "data.py: " in said and "Traceback" not in said
    assert not list((tmp_path / "new").glob("*.npy*"))


def test_a_torch_without_distributed(tmp_path):
    """Can import the scripts: they need it only for more than one process."""
    lines = [
        "import sys, torch",
        "sys.modules['torch.distributed.nn'] = None",
        f"sys.path.insert(0, {str(HERE)!r})",
        "import gan_qp, sgan_sn, wgan_gp",
        "print('imported')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr


def torchrun(*words):
    """Two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    return start([*launch, *words])


def average_step(states, name, losses):
    """One step of network `name` in all states, down the mean of the gradients of their losses."""
    for state, loss in zip(states, losses, strict=True):
        state[f"opt_{name}"].zero_grad()
        loss.backward()
    for parameters in zip(*(state[name].parameters() for state in states), strict=True):
        mean = torch.stack([p.grad for p in parameters]).mean(0)
        for parameter in parameters:
            parameter.grad.copy_(mean)
    for state in states:
        state[f"opt_{name}"].step()


@pytest.mark.parametrize("script", [gan_qp, wgan_gp], ids=["gan_qp", "wgan_gp"])
def test_two_processes_share_each_batch(script, cache, tmp_path, inception_file):
    """Each takes its half of images and noise, and both step down the mean of their gradients."""
    out = tmp_path / "run"
    flags = [*TINY, "--d-steps", 1, "--iters", 1, "--cache-dir", cache, "--out", out]
    if script is gan_qp:
        flags += ["--fid-every", 1, "--fid-samples", 4, "--fid-weights", inception_file]
    process = torchrun(HERE / f"{script.__name__}.py", *flags)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert ("fid" in log_of(out)[-1]) == (script is gan_qp)
    saved = weights(out / "last.pt")

    # the same in one process, for both ranks in turns
    images = data.load_images("synthetic:12", 16, cache)
    ranks = [argparse.Namespace(**{**saved["args"], "rank": rank}) for rank in (0, 1)]
    states = [script.build(args, torch.device("cpu")) for args in ranks]
    seed = int(np.random.SeedSequence((0, 1)).generate_state(1)[0])
    rngs = [torch.Generator().manual_seed(seed) for _ in ranks]
    batches = [data.Batches(images, 4, "cpu", rank=rank, world=2) for rank in (0, 1)]
    d_losses = []
    g_losses = []
    for args, state, rng, own in zip(ranks, states, rngs, batches, strict=True):
        x_fake = state["G"](script.draw_noise(rng, args)).detach()
        extra = [rng] if script is wgan_gp else []
        loss, _, _ = script.discriminator_loss(state["D"], own[0], x_fake, args, *extra)
        d_losses.append(loss)
    average_step(states, "D", d_losses)
    for args, state, rng, own in zip(ranks, states, rngs, batches, strict=True):
        x_fake = state["G"](script.draw_noise(rng, args))
        g_losses.append(script.generator_loss(state["D"], own[1], x_fake, args))
    average_step(states, "G", g_losses)

    initial = script.build(ranks[0], torch.device("cpu"))
    for network in ("G", "D"):
        steps = []
        for state in (saved[network], states[0][network].state_dict()):
            pairs = [(state[name], p) for name, p in initial[network].named_parameters()]
            steps.append(torch.cat([(after - before).flatten() for after, before in pairs]))
        assert F.cosine_similarity(*steps, dim=0) > 0.999
    logged = log_of(out)[0]
    assert logged["d_loss"] == pytest.approx(torch.stack(d_losses).mean().item(), rel=1e-5)
    assert logged["g_loss"] == pytest.approx(torch.stack(g_losses).mean().item(), rel=1e-5)


def test_two_processes_stop_together(cache, tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--cache-dir", cache, "--iters", 10**6, "--log-every", 10**5, "--out", out]
    process = torchrun(HERE / "gan_qp.py", *flags)
    while not (out / "last.pt").exists():
        time.sleep(0.1)
        assert process.poll() is None
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert time.perf_counter() - began < 20 and said.count("stopped and saved") == 1, said
    assert weights(out / "last.pt")["iter"] == log_of(out)[-1]["iter"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_torchrun_restarts_a_run_one_of_whose_processes_was_killed(cache, tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--cache-dir", cache, "--iters", 200, "--out", out, "--resume"]
    process = torchrun("--max-restarts", 2, HERE / "gan_qp.py", *flags)
    while not (out / "last.pt").exists():
        time.sleep(0.02)
        assert process.poll() is None
    for stat in Path("/proc").glob("[0-9]*/stat"):
        number, parent = stat.parent.name, stat.read_text().rsplit(")", 1)[1].split()[1]
        if parent == str(process.pid):
            os.kill(int(number), signal.SIGKILL)
            break
    said = process.communicate()[0]
    assert process.returncode == 0 and said.count("gan_qp: 12 images") == 2, said
    assert weights(out / "last.pt")["iter"] == 200
    rows = [row["iter"] for row in log_of(out)]
    assert rows == sorted(set(rows)) and rows[-1] == 200


def test_help_is_quick():
    began = time.perf_counter()
    process = command("gan_qp", "--help")
    said = process.communicate()[0]
    assert process.returncode == 0 and "--img-size" in said and time.perf_counter() - began < 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda(script, cli, monkeypatch, tmp_path):
    flags = ["--device", "cuda", "--precision", "auto", "--iters", 3, "--out", tmp_path / "run"]
    assert cli(script, *TINY, *flags)[0] == 0
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    on_cpu = data.Batches(images, 4, "cpu", flip=True)
    on_gpu = data.Batches(images, 4, "cuda", flip=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    streamed = data.Batches(images, 4, "cuda", flip=True)
    assert streamed.fetch == streamed.from_thread
    for k in (0, 1, 2, 9):
        # CUDA multiplies by 1 / 127.5 where the CPU divides, so the last bit may differ
        torch.testing.assert_close(on_gpu[k].cpu(), on_cpu[k], rtol=0, atol=1e-6)
        assert torch.equal(on_gpu[k], streamed[k])


# ---------------------------------------------------------------- FID


def random_stats(seed, n=300, dim=64):
    """Features of a random Gaussian -> (features, FeatureStats)."""
    features = np.random.default_rng(seed).normal(size=(n, dim))
    features = features @ np.random.default_rng(seed + 1).normal(size=(dim, dim)) + seed
    stats = fid.FeatureStats(dim)
    stats.update(features)
    return features, stats


def distance_of(one, two):
    return fid.frechet_distance(one.mean, one.cov, two.mean, two.cov)


def save_noise(folder, count, size=(30, 30), seed=0):
    """A folder of PNGs -> the images, a list of arrays."""
    folder.mkdir()
    images = [make_image(seed + i, size) for i in range(count)]
    for i, image in enumerate(images):
        image.save(folder / f"{i:04}.png")
    return [np.asarray(image) for image in images]


def test_frechet_distance_in_closed_form():
    mu = np.array([1.0, 2.0, 3.0])
    a = np.diag([1.0, 4.0, 9.0])
    b = np.diag([4.0, 0.0, 1.0])
    assert fid.frechet_distance(mu, a, mu + 1, b) == pytest.approx(3 + 1 + 4 + 4)

    _, s = random_stats(0)
    _, t = random_stats(5)
    roots = np.sqrt(np.linalg.eigvals(s.cov @ t.cov).real.clip(0)).sum()
    expected = ((s.mean - t.mean) ** 2).sum() + np.trace(s.cov + t.cov) - 2 * roots
    assert distance_of(s, t) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_singular_covariances():
    _, s = random_stats(0)
    _, few = random_stats(2, n=10)
    for stats in (s, few):
        assert 0 <= distance_of(stats, stats) < 1e-6 * np.trace(stats.cov)
    assert distance_of(s, few) == pytest.approx(distance_of(few, s), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", range(4))
def test_statistics_that_are_not_finite_are_refused(place, bad):
    statistics = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
    statistics[place].flat[0] = bad
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet_distance(*statistics)


def test_features_that_would_broadcast_are_refused(inception):
    mu = np.zeros(3)
    sigma = np.eye(3)
    with pytest.raises(ValueError, match="do not match"):
        fid.frechet_distance(mu, sigma, mu[:1], sigma)
    with pytest.raises(ValueError, match="do not match"):
        fid.frechet_distance(mu, sigma, mu, sigma[:1])

    stats = fid.FeatureStats(3)
    for features in (np.zeros((5, 1)), np.zeros(3), np.zeros((5, 3, 3))):
        with pytest.raises(ValueError, match=r"not \(B, 3\)"):
            stats.update(features)
    with pytest.raises(ValueError, match="1 and 3 dimensions"):
        stats.merge(fid.FeatureStats(1))
    assert stats.n == 0

    for images in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="not uint8"):
            inception(images)


def test_statistics_of_batches_are_those_of_the_whole():
    features, whole = random_stats(1)
    one = fid.FeatureStats(64)
    two = fid.FeatureStats(64)
    for i in range(0, 300, 70):
        (one if i < 140 else two).update(torch.from_numpy(features[i : i + 70]).float())
    one.merge(two)
    assert one.n == 300
    np.testing.assert_allclose(one.mean, features.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.cov, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)

    for stats, moment in ((fid.FeatureStats(3), "mean"), (fid.FeatureStats(3), "cov")):
        with pytest.raises(ValueError, match="at least"):
            getattr(stats, moment)


def test_weights_that_do_not_fit_are_named(inception_file, tmp_path):
    state = weights(inception_file)
    first = "Conv2d_1a_3x3.conv.weight"
    without = {name: tensor for name, tensor in state.items() if name != first}
    zeros = torch.zeros(1000, 2048)
    cases = [
        (without, f"Missing.*{first}"),
        ({**state, "surplus": zeros}, "Unexpected.*surplus"),
        ({**without, "surplus": zeros}, f"Missing.*{first}.*Unexpected.*surplus"),
        ({**state, "fc.weight": zeros}, "size mismatch for fc.weight"),
        ([zeros], "dict"),
    ]
    for wrong, reason in cases:
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=rf"wrong\.pth does not fit .*{reason}.*--weights"):
            fid.load_inception(tmp_path / "wrong.pth")


def test_weights_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "WEIGHTS_URL", "http://127.0.0.1:9/weights-12345678.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="could not be downloaded.*--fid-weights"):
        fid.load_inception()
    assert not list(tmp_path.rglob("*.pth"))


def test_damaged_download_is_replaced(inception_file, inception, monkeypatch, tmp_path, capsys):
    import hashlib

    content = inception_file.read_bytes()
    monkeypatch.setattr(fid, "WEIGHTS_URL", inception_file.as_uri())
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest()[:8])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / inception_file.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content[:1000])
    assert fid.load_inception().digest == inception.digest
    assert kept.read_bytes() == content and "damaged" in capsys.readouterr().err

    monkeypatch.setattr(fid, "WEIGHTS_URL", "http://127.0.0.1:9/inception.pth")
    assert fid.load_inception().digest == inception.digest  # from the folder

    kept.write_bytes(content[:1000])  # what is there stays until there is a better one
    with pytest.raises(ValueError, match="could not be downloaded"):
        fid.load_inception()
    assert kept.read_bytes() == content[:1000]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs torch 2.9")
def test_network_runs_without_tf32_and_without_warnings(inception, recwarn):
    """Also where only the new switches are set, of which `cudnn.flags` makes an error."""
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    seen = []
    hook = inception.net.register_forward_hook(lambda *_: seen.append(switch.fp32_precision))
    try:
        for setting in ("tf32", "ieee"):
            switch.fp32_precision = setting
            inception(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
            assert switch.fp32_precision == setting
    finally:
        hook.remove()
        switch.fp32_precision = before
    assert seen == ["ieee", "ieee"] and not recwarn.list


def test_features_and_distance_are_those_of_pytorch_fid(
    inception_file, inception, tmp_path, monkeypatch, cli, capsys
):
    peer = pytest.importorskip("pytorch_fid.inception", reason="needs pytorch-fid")
    score = pytest.importorskip("pytorch_fid.fid_score")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: weights(inception_file))
    net = peer.InceptionV3([3]).eval()
    images = np.stack([np.asarray(data.draw_face(i, 80)) for i in range(24)])
    halves = torch.from_numpy(images).permute(0, 3, 1, 2).split(12)

    def timed(function, *args):
        began = time.perf_counter()
        result = function(*args)
        return result, time.perf_counter() - began

    with torch.no_grad():
        both = timed(lambda: torch.cat([net(half / 255)[0].flatten(1) for half in halves]))
    theirs, their_time = both
    ours, our_time = timed(lambda: torch.cat([inception(half) for half in halves]))
    assert theirs.std() > 0.1 and (ours - theirs).norm() < 1e-4 * theirs.norm()

    parts = theirs.double().numpy().reshape(2, 12, -1)
    statistics = [f(part) for part in parts for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    expected, their_root = timed(score.calculate_frechet_distance, *statistics)
    value, our_root = timed(fid.frechet_distance, *statistics)
    assert value == pytest.approx(expected, rel=1e-3)
    with capsys.disabled():
        print(
            f"\nfeatures: {24 / our_time:.1f} images/s (pytorch-fid {24 / their_time:.1f}); "
            f"distance in {our_root:.1f} s ({their_root:.1f} s)"
        )

    # Their statistics are read by us, and ours by them.
    own = ["--weights", inception_file, "--device", "cpu"]
    np.save(tmp_path / "a.npy", images[:12])
    np.savez(tmp_path / "b.npz", mu=statistics[2], sigma=statistics[3])
    code, out, err = cli("fid", tmp_path / "a.npy", tmp_path / "b.npz", *own)
    assert code == 0 and float(out) == pytest.approx(expected, rel=1e-3) and "not reliable" in err
    ours = tmp_path / "a.npz"
    assert cli("fid", tmp_path / "a.npy", "--save-stats", ours, *own)[0] == 0
    mu, sigma = score.compute_statistics_of_path(str(ours), None, 1, 2048, "cpu")
    np.testing.assert_allclose(mu, statistics[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sigma, statistics[1], rtol=1e-2, atol=1e-2)
    code, out, _ = cli("fid", ours, tmp_path / "b.npz")  # needs no weights
    assert code == 0 and float(out) == pytest.approx(expected, rel=1e-3)


def test_resizing_is_that_of_clean_fid():
    resize = pytest.importorskip("cleanfid.resize", reason="needs clean-fid")
    for shape in ((40, 50), (400, 350)):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        ours = fid.clean_resize(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        theirs = resize.build_resizer("clean")(image)
        np.testing.assert_allclose(ours.permute(1, 2, 0), theirs, atol=0.02)


def test_mixed_sizes_are_measured_each_at_its_own(inception, tmp_path):
    save_noise(tmp_path / "set", 2)
    make_image(2, (50, 50)).save(tmp_path / "set" / "large.png")
    stats = fid.measure(fid.open_images(tmp_path / "set"), inception)
    assert stats.n == 3
    each = []
    for i, size in enumerate((30, 30, 50)):
        image = torch.from_numpy(np.array(make_image(i, (size, size))))
        each.append(inception(image.permute(2, 0, 1)[None]))
    expected = torch.cat(each).double().mean(0)
    np.testing.assert_allclose(stats.mean, expected, rtol=1e-4, atol=1e-5)


def read_all(path):
    """Every image that fid.py finds -> [(name, array), ...]."""
    return [pair for batch in fid.open_images(path).batches() for pair in batch]


def test_folder_with_links_and_other_files(tmp_path, capsys):
    home = tmp_path / "set"
    first, second = save_noise(home, 2)
    save_noise(tmp_path / "elsewhere", 1, seed=7)
    (home / "sub").mkdir()
    for name in ("UPPER.PNG", "sub/a.jfif", "sub/b.ppm", "sub/c.tga"):
        make_image(3).save(home / name, {"jfif": "JPEG"}.get(name[-4:]))
    for name in ("notes.txt", "x.HEIC", "y.heic", "more.zip", "none", ".hidden.png", "broken.png"):
        (home / name).write_bytes(b"no image")
    (home / ".cache").mkdir()
    make_image(4).save(home / ".cache" / "0.png")
    (home / "folder.png").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(home / "pipe.png")
    try:
        (home / "again").symlink_to(home, target_is_directory=True)
        (home / "sub" / "up").symlink_to(home, target_is_directory=True)
        (home / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("needs symbolic links")

    found = read_all(home)
    expected = ["0000.png", "0001.png", "UPPER.PNG", "linked/0000.png", "sub/a.jfif"]
    assert [name for name, _ in found] == [*expected, "sub/b.ppm", "sub/c.tga"]
    assert np.array_equal(found[0][1], first) and np.array_equal(found[1][1], second)
    said = capsys.readouterr().err
    assert "5 other files: 2 .heic, 1 .txt, 1 .zip, 1 without an extension" in said
    assert "7 images" in said and "skipped 'broken.png'" in said
    assert "skipped 'pipe.png': not a file" in said or not hasattr(os, "mkfifo")


def test_name_that_is_twice_in_an_archive(tmp_path, capsys):
    one, two = save_noise(tmp_path / "set", 2)
    path = tmp_path / "set.ZIP"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("folder.png/", b"")
        archive.write(tmp_path / "set" / "0000.png", "x.png")
        archive.write(tmp_path / "set" / "0001.png", "x.png")
        archive.writestr("__MACOSX/._x.png", b"no image")
        archive.writestr("readme", b"no image")
    (_, first), (_, second) = read_all(path)
    assert np.array_equal(first, one) and np.array_equal(second, two)
    assert "1 other file: 1 without an extension" in capsys.readouterr().err


def test_pixels_are_read_as_pytorch_fid_reads_them(tmp_path):
    image = make_image(0, (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    clear = image.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "b.png")
    for _, pixels in read_all(tmp_path):
        assert np.array_equal(pixels, np.asarray(image))


@pytest.fixture
def bad_sets(tmp_path, monkeypatch):
    """The working directory, with sets of every bad kind, and a.npz, which is good."""
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("b.npz", mu=np.zeros(3), sigma=np.eye(3) * 4)
    np.savez("other.npz", mean=np.zeros(3))
    np.savez("shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez("nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez("objects.npz", mu=np.array([{}]), sigma=np.eye(1))
    np.savez("small.npz", mu=np.zeros(2), sigma=np.eye(2))  # of other features
    np.save("single.npy", np.zeros((3, 3)))
    Path("single.npy").rename("single.npz")
    np.save("float.npy", np.zeros((3, 8, 8, 3)))
    np.save("whole.npy", np.zeros((3, 8, 8, 3), np.uint8))
    Path("torn.npy").write_bytes(Path("whole.npy").read_bytes()[:-9])
    for name in ("text.npz", "text.npy", "text.zip", "text.txt"):
        Path(name).write_text("no such thing")
    for name in ("empty.npz", "empty.npy", "empty.zip"):
        Path(name).touch()
    save_noise(Path("set"), 3)
    Path("nothing").mkdir()


@pytest.mark.parametrize(
    "name, words",
    [
        ("text.npz", "statistics"),
        ("empty.npz", "statistics"),
        ("single.npz", "statistics"),
        ("objects.npz", "statistics"),
        ("other.npz", "holds mean, not"),
        ("shapes.npz", "(2, 2)"),
        ("nan.npz", "not finite"),
        ("small.npz", "2 features"),
        ("float.npy", "float64"),
        ("torn.npy", "not a valid"),
        ("text.npy", "not a valid"),
        ("empty.npy", "not a valid"),
        ("text.zip", "not a valid"),
        ("empty.zip", "not a valid"),
        ("text.txt", "not a folder"),
        ("missing", "does not exist"),
        ("", "empty"),
        ("nothing", "no images"),
    ],
)
def test_set_that_cannot_be_used_is_refused_at_once(name, words, bad_sets, cli):
    refused(cli("fid", "set", name, "--weights", "none"), words)  # no network was asked for


def test_set_with_one_readable_image_is_refused(bad_sets, cli, inception_file):
    Path("set/0001.png").write_bytes(b"broken")
    Path("set/0002.png").write_bytes(b"broken")
    flags = ["--weights", inception_file, "--device", "cpu"]
    refused(cli("fid", "set", "set", *flags), "set holds 1 readable")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["a.npz"], "two sets"),
        (["a.npz", "b.npz", "a.npz"], "two sets"),
        (["a.npz", "small.npz"], "do not match"),
        (["set", "set", "--save-stats", "new.npz"], "one set"),
        (["a.npz", "--save-stats", "new.npz"], "a.npz holds statistics"),
        (["set", "--save-stats", "a.npz"], "exists"),
        (["set", "--save-stats", "missing/new.npz"], "cannot be written"),
        (["set", "--save-stats", "text.txt/new.npz"], "cannot be written"),
        (["set", "--save-stats", "new.npy"], "end in .npz"),
        (["set", "--save-stats", ""], "empty"),
        (["set", "set", "--weights", "missing.pth"], "missing.pth"),
        (["a.npz", "b.npz", "--device", "cuda:99"], "--device"),
        (["a.npz", "set", "--swd"], "a.npz holds statistics"),
        (["set", "set", "--swd", "--clean"], "leave out"),
        (["set", "--swd", "--save-stats", "new.npz"], "leave out"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words, bad_sets, cli):
    refused(cli("fid", *flags), words)
    assert not Path("new.npz").exists()


def test_home_is_expanded(bad_sets, cli, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, os.getcwd())
    monkeypatch.chdir("nothing")
    code, out, _ = cli("fid", "~/a.npz", "~/b.npz")
    assert code == 0 and float(out) == pytest.approx(3)


def test_fid_in_training(inception_file, cli, tmp_path, monkeypatch):
    written = []
    atomic_write = data.atomic_write

    def noting(path):
        written.append(Path(path).name)
        return atomic_write(path)

    flags = [*TINY, "--iters", 4, "--log-every", 4]
    measured = ["--fid-every", 2, "--fid-samples", 6, "--fid-weights", inception_file]
    assert cli("gan_qp", *flags, "--out", tmp_path / "off")[0] == 0
    monkeypatch.setattr(data, "atomic_write", noting)
    assert cli("gan_qp", *flags, *measured, "--out", tmp_path / "on")[0] == 0
    # Before each FID, which takes long, and after it: if the log lost a FID, a worse state could
    # replace best.pt.
    assert written.count("last.pt") == 5
    log = [row for row in log_of(tmp_path / "on") if "fid" in row]
    assert [row["iter"] for row in log] == [2, 4] and all(row["fid"] > 0 for row in log)

    on = weights(tmp_path / "on" / "last.pt")
    off = weights(tmp_path / "off" / "last.pt")
    assert_same(on, off)
    best = min(log, key=lambda row: row["fid"])["iter"]
    assert weights(tmp_path / "on" / "best.pt")["iter"] == best


# ---------------------------------------------------------------- sliced Wasserstein distance


def noise_set(path, count=256, size=16, seed=0):
    """An .npy of images of white noise, mean 128, deviation 40, at `path` -> the images."""
    values = np.random.default_rng(seed).normal(128, 40, (count, size, size, 3))
    images = values.round().clip(0, 255).astype(np.uint8)
    np.save(path, images)
    return images


def swd_of(result):
    """Standard output of --swd -> {level: distance}, in the order of the lines."""
    code, out, err = result
    assert code == 0, err
    return {name: float(value) for name, value in map(str.split, out.splitlines())}


def test_sliced_wasserstein_of_shifted_and_scaled_noise():
    """A shift t in D dimensions is |t| Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)) on a random line."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, 12)).astype(np.float32)
    shift = rng.normal(size=12).astype(np.float32)
    on_a_line = np.linalg.norm(shift) * math.gamma(6) / (math.sqrt(math.pi) * math.gamma(6.5))
    distance = fid.sliced_wasserstein(points, points + shift, directions=4000)
    assert distance == pytest.approx(on_a_line, rel=0.03)
    # Normal noise three times as wide: (3 - 1) E|z|.
    distance = fid.sliced_wasserstein(points, 3 * points)
    assert distance == pytest.approx(2 * math.sqrt(2 / math.pi), rel=0.02)
    with pytest.raises(ValueError, match="shapes"):
        fid.sliced_wasserstein(points, points[:-1])


def test_swd_of_noise_against_blank_images_in_closed_form(cli, tmp_path):
    """At 16 px there is one level, the images. In noise, a normalised patch of 147 values is
    standard normal on every line; in blank images, each of one random colour, it has the variance
    sum S_c^2, where S_c is the sum of the line's direction over the 49 values of channel c."""
    noise = noise_set(tmp_path / "noise.npy", 2048)
    blank = np.broadcast_to(noise[:, :1, :1], noise.shape)
    np.save(tmp_path / "blank.npy", blank[::-1])
    directions = np.random.default_rng(9).normal(size=(100_000, 3, 49))
    directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)
    deviation = np.sqrt((directions.sum(2) ** 2).sum(1))
    expected = 1000 * math.sqrt(2 / math.pi) * np.abs(1 - deviation).mean()

    found = swd_of(cli("fid", tmp_path / "noise.npy", tmp_path / "blank.npy", "--swd"))
    assert list(found) == ["16", "mean"] and found["16"] == found["mean"]
    assert found["mean"] == pytest.approx(expected, rel=0.05)


def test_swd_of_a_set_and_itself_is_zero_in_any_order(cli, tmp_path):
    images = noise_set(tmp_path / "a.npy", size=32)
    order = np.random.default_rng(0).permutation(len(images))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for i, image in enumerate(images[order]):
            Image.fromarray(image).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"{i:03}.png")
    found = swd_of(cli("fid", tmp_path / "a.npy", tmp_path / "b.zip", "--swd"))
    assert found == {"32": 0, "16": 0, "mean": 0}


def test_swd_depends_on_the_seed_alone(tmp_path):
    noise_set(tmp_path / "a.npy", seed=1)
    noise_set(tmp_path / "b.npy", seed=2)
    a = fid.open_images(tmp_path / "a.npy")
    b = fid.open_images(tmp_path / "b.npy")
    assert fid.compare_by_level(a, b) == fid.compare_by_level(a, b, seed=0)
    assert fid.compare_by_level(a, b) != fid.compare_by_level(a, b, seed=1)


def test_swd_leaves_out_brightness_and_contrast_but_sees_blur(cli, tmp_path):
    images = noise_set(tmp_path / "a.npy", size=64)
    np.save(tmp_path / "faint.npy", (images * 0.5 + 20).round().astype(np.uint8))
    blurred = fid.blur(torch.from_numpy(images).permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1)
    np.save(tmp_path / "blurred.npy", blurred.round().byte().numpy())
    faint = swd_of(cli("fid", tmp_path / "a.npy", tmp_path / "faint.npy", "--swd"))
    assert list(faint) == ["64", "32", "16", "mean"] and max(faint.values()) < 25
    found = swd_of(cli("fid", tmp_path / "a.npy", tmp_path / "blurred.npy", "--swd"))
    assert found["64"] > 50
    assert found["mean"] == pytest.approx((found["64"] + found["32"] + found["16"]) / 3, abs=2e-3)


def test_pyramid_adds_up_to_the_image():
    images = torch.rand(2, 3, 64, 64)
    large, middle, small = fid.laplacian_pyramid(images)
    assert [level.shape[-1] for level in (large, middle, small)] == [64, 32, 16]
    for level in (middle, large):
        enlarged = torch.zeros_like(level)
        enlarged[:, :, ::2, ::2] = small
        small = level + 4 * fid.blur(enlarged)
    torch.testing.assert_close(small, images)
    smooth = torch.full((1, 3, 32, 32), 77.0)  # mirrored edges: nothing is lost at the border
    torch.testing.assert_close(fid.laplacian_pyramid(smooth)[0], torch.zeros(1, 3, 32, 32))


def test_swd_takes_images_from_all_over_a_set(monkeypatch, tmp_path, cli):
    """Of sorted and of mixed images alike; the first 4,096 would be another set."""
    monkeypatch.setattr(fid, "SWD_IMAGES", 256)
    images = noise_set(tmp_path / "noise.npy", 1024)
    images[512:] = images[512:, :1, :1]  # half of them blank
    np.save(tmp_path / "sorted.npy", images)
    np.save(tmp_path / "mixed.npy", images[np.random.default_rng(0).permutation(1024)])
    sets = [fid.open_images(tmp_path / f"{name}.npy") for name in ("sorted", "mixed")]
    assert fid.compare_by_level(*sets)[16] < 80


def test_swd_of_sets_of_different_length_with_broken_images(cli, tmp_path):
    noise_set(tmp_path / "a.npy", 300, seed=1)
    save_noise(tmp_path / "b", 200, (16, 16))
    for i in range(50):
        (tmp_path / "b" / f"{i:04}.png").write_bytes(b"broken")
    code, _, err = cli("fid", tmp_path / "a.npy", tmp_path / "b", "--swd")
    assert code == 0 and "50 skipped" in err and "150 images of each set" in err


def test_sets_that_swd_cannot_compare_are_refused(cli, tmp_path):
    noise_set(tmp_path / "a.npy", 128)
    noise_set(tmp_path / "large.npy", 128, size=32)
    noise_set(tmp_path / "few.npy", 127)
    noise_set(tmp_path / "odd.npy", 128, size=24)
    noise_set(tmp_path / "tiny.npy", 128, size=8)
    np.save(tmp_path / "wide.npy", np.zeros((128, 16, 32, 3), np.uint8))
    save_noise(tmp_path / "mixed", 127, (16, 16))
    make_image(0, (32, 32)).save(tmp_path / "mixed" / "other.png")
    cases = [
        ("large.npy", "32 px"),
        ("few.npy", "128"),
        ("odd.npy", "24 x 24"),
        ("tiny.npy", "8 x 8"),
        ("wide.npy", "32 x 16"),
        ("mixed", "other.png"),
    ]
    for name, words in cases:
        refused(cli("fid", tmp_path / "a.npy", tmp_path / name, "--swd"), words)


# ---------------------------------------------------------------- README


def test_readme_snippets(tmp_path, monkeypatch):
    """The loss, and how to load a generator, as the README shows them."""
    monkeypatch.chdir(tmp_path)
    Path("runs/gan_qp-32").mkdir(parents=True)
    flags = {"img_size": 32, "z_dim": 128, "max_channels": 128}
    checkpoint = {"args": flags, "G_ema": gan_qp.Generator(32, 128, 128).state_dict()}
    torch.save(checkpoint, "runs/gan_qp-32/last.pt")
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    loss = {}
    load = {}
    exec(snippets[0], loss)
    expected = gan_qp.qp_divergence(loss["delta"], loss["distance"]).mean()
    torch.testing.assert_close(-loss["d_loss"], expected)
    exec(snippets[1], load)
    assert load["images"].shape == (16, 3, 32, 32)


def test_readme_flags(monkeypatch):
    """The README lists every flag of the scripts that it uses, each with its default."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    defaults = {}
    for module in (sgan_sn, wgan_gp, gan_qp):  # gan_qp last: the list has its defaults
        defaults |= vars(module.parse_args())
    text = (HERE / "README.md").read_text()
    listing = re.search(r"^--data .*?(?=```)", text, re.S | re.M)[0]
    for line in listing.splitlines():
        flag, default = line.split()[:2]
        value = defaults[flag[2:].replace("-", "_")]
        if isinstance(value, int | float):
            assert value == (0 if default == "off" else float(default)), flag

    others = {"--swd", "--clean", "--weights", "--save-stats"}  # of fid.py
    others |= {"--nproc-per-node", "--max-restarts"}  # of torchrun
    used = set(re.findall(r"--[a-z][a-z-]+", text)) - others
    listed = set(re.findall(r"--[a-z][a-z-]+", listing))
    assert not used - listed
    assert all(flag[2:].replace("-", "_") in defaults for flag in listed)
