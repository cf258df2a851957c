"""Run all tests: python -m pytest. A quick check, in a few seconds: -k smoke_run

They need no network and no GPU; what needs CUDA is skipped without it.
"""

import argparse
import ast
import contextlib
import inspect
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.inception import inception_v3

import data
import fid
import gan_qp
import sgan_sn
import wgan_gp

# processes that tests start inherit ignored signals: nohup's SIGHUP, SIGINT after a shell's &
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

HERE = Path(__file__).parent
SCRIPTS = ["gan_qp", "wgan_gp", "sgan_sn"]
MODULES = [gan_qp, wgan_gp, sgan_sn]
TINY = "--data synthetic:12 --img-size 16 --batch-size 4 --max-channels 8 --z-dim 8 --device cpu"
TINY = TINY.split()
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(cache, monkeypatch, capsys):
    """cli("gan_qp", flags...) runs a script as its command line does -> (code, stdout, stderr)."""

    def run(script, *flags):
        own = [] if script == "fid" else ["--cache-dir", cache]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, [*own, *flags])])
        said = io.StringIO()  # as in a notebook, which also outlives the run
        code = 0
        try:
            with contextlib.redirect_stdout(said):
                runpy.run_path(str(HERE / f"{script}.py"), run_name="__main__")
            assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        return code, said.getvalue(), capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights under pytorch-fid's names, drawn so that the features do not vanish."""
    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()(torch.randn(4, 3, 299, 299))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


def refused(result, *words):
    """The script ended with one line on standard error that holds these words, and exit code 2."""
    code, _, err = result
    lines = [line for line in err.splitlines() if ".py: error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert all(word in lines[0] for word in words), lines[0]


def weights(path):
    return torch.load(path, weights_only=True)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    """Two checkpoints are equal to the bit, except for the log, with its clock, and the flags."""
    assert a.keys() == b.keys()
    for part in a.keys() - {"log", "args"}:
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def start(*words, cwd=None, **variables):
    """A process group of its own, with one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env |= {name: str(value) for name, value in variables.items()}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=cwd, env=env, start_new_session=True, **said)


def noise_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise_folder(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        noise_image(i).save(folder / f"{i:04}.png")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "gan_qp --pairwise",
        "wgan_gp --precision bf16",
        "wgan_gp --constraint sn",
        "wgan_gp --constraint clip",
        "sgan_sn --no-sn --precision bf16",
    ],
)
def test_smoke_run(command, cli, tmp_path):
    """Two iterations, then samples of their generator."""
    run = tmp_path / "run"
    script, *flags = command.split()
    assert cli(script, *TINY, *flags, "--iters", 2, "--out", run)[0] == 0
    D = weights(run / "last.pt")["D"]
    assert (max(weight.abs().max() for weight in D.values()) <= 0.01) == ("clip" in flags)
    assert ("linear.parametrizations.weight.original" in D) == ("sn" in flags)
    sampling = ["--sample", run / "last.pt", "--num-samples", 3, "--device", "cpu"]
    assert cli(script, *sampling, "--out", tmp_path / "images")[0] == 0
    images = sorted((tmp_path / "images").iterdir())
    assert [Image.open(image).size for image in images] == [(16, 16)] * 3


# ------------------------------------------------------------------------------------ the method
def test_optimal_discriminator(capsys):
    """On five points the best T is lambda d (a - b) / (a + b), and its value the divergence."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(5, 2)))
    p, q = torch.from_numpy(rng.dirichlet(np.ones(5), 2))
    d = torch.cdist(x, x)
    a = torch.outer(p, q)  # whose transpose is b
    T = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    tolerance = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([T], max_iter=500, line_search_fn="strong_wolfe", **tolerance)

    def loss():
        optimizer.zero_grad()
        value = -(a * gan_qp.qp_divergence(T - T.T, d)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    best = 10 * d * (a - a.T) / (a + a.T)
    error = (T - T.T - best).abs().max().item()
    with capsys.disabled():
        print(f"\n\nbest delta on five points: up to {best.max():.2f}, found within {error:.0e}")
    assert error < 1e-6
    divergence = (5 * d * (a - a.T) ** 2 / (a + a.T)).sum().item() / 2
    assert -loss().item() == pytest.approx(divergence, rel=1e-6)


def lifted(function):
    """Its text alone, pasted under the imports, as a reader would copy it."""
    names = {"torch": torch, "F": F}
    exec(inspect.getsource(function), names)
    return names[function.__name__]


def test_distance_is_for_each_pair():
    pair_distance = lifted(gan_qp.pair_distance)
    x = torch.zeros(3, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, -1.0)])
    y[1, 0] = 0
    for metric, middle in (("l1", 1 / 3), ("l2", math.sqrt(1 / 6))):
        torch.testing.assert_close(pair_distance(x, y, metric), torch.tensor([0.0, middle, 1.0]))
    for arguments in ((x, y[:1]), (x, y, "cosine")):
        with pytest.raises(ValueError, match="are not pairs|metric"):
            pair_distance(*arguments)


def test_losses_refuse_shapes_that_would_broadcast():
    """Scores (B, 1) against distances (B,) would give (B, B), and another optimum."""
    scores = torch.linspace(-5, 5, 4)
    value = lifted(gan_qp.qp_divergence)(scores, 0 * scores)  # of equal images
    assert value.shape == (4,) and value.isfinite().all()
    with pytest.raises(ValueError, match=r"\(4, 1\) and distance \(4,\)"):
        gan_qp.qp_divergence(scores[:, None], scores)
    x = torch.rand(4, 3, 8, 8)
    penalty = lifted(wgan_gp.gradient_penalty)
    assert penalty(lambda x: x.sum((1, 2, 3)), x, x).shape == ()
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\) and \(1, 3, 8, 8\)"):
        penalty(lambda x: x.sum((1, 2, 3)), x, x[:1])
    assert lifted(sgan_sn.sgan_loss)(scores, scores).shape == ()


def arguments(monkeypatch, command):
    """A command line without "python" and ".py" -> its module, the flags."""
    monkeypatch.setattr(sys, "argv", [*command.split(), "--device", "cpu", "--out", "none"])
    module = sys.modules[sys.argv[0]]
    return module, module.parse_args(argparse.ArgumentParser())[0]


@pytest.mark.parametrize(
    "command", ["gan_qp", "gan_qp --pairwise", "wgan_gp", "wgan_gp --constraint div", "sgan_sn"]
)
def test_losses_of_an_iteration(command, monkeypatch):
    """In closed form, for a linear D; of G's loss the gradient, which no other term may reach."""
    module, args = arguments(monkeypatch, command)
    vars(args).update(d_steps=1, lam=3.0, power=4, gp_weight=3.0)
    torch.manual_seed(0)
    G = nn.Sequential(nn.Linear(8, 12), nn.Unflatten(1, (3, 2, 2)))
    D = nn.Sequential(nn.Flatten(), nn.LazyLinear(1, bias=False), nn.Flatten(0))
    x = torch.randn(2, 4, 3, 2, 2)
    z = torch.randn(2, 4, 8)
    y = G(z[0]).detach()
    delta = gan_qp.score_difference(D, x[0], y, "--pairwise" in command)
    g_loss = gan_qp.score_difference(D, x[1], G(z[1]), "--pairwise" in command).mean()
    norm = D[1].weight.norm()
    if module is gan_qp:
        d = (x[0] - y).abs().mean((1, 2, 3))
        d_loss = -(delta - delta**4 / (4 * (3 * d) ** 3)).mean()
    if module is wgan_gp:
        d_loss = (2 * norm**6 if "div" in command else 3 * (norm - 1) ** 2) - delta.mean()
    if module is sgan_sn:
        d_loss = -(D(x[0]).sigmoid().log() + (1 - D(y).sigmoid()).log()).mean()
        g_loss = -D(G(z[1])).sigmoid().log().mean()
    expected = torch.autograd.grad(g_loss, list(G.parameters()))
    optimizers = [torch.optim.SGD(network.parameters(), lr=0) for network in (G, D)]
    losses = module.train_iteration(x, z, G, D, *optimizers, args)
    torch.testing.assert_close(losses["d_loss"], d_loss)
    if module is not gan_qp:
        value = delta.mean() if module is wgan_gp else math.log(2) - d_loss / 2
        torch.testing.assert_close(losses["divergence"], value)
    torch.testing.assert_close([weight.grad for weight in G.parameters()], list(expected))


def test_penalties_on_the_gradient():
    """Finite where the gradient is exactly zero, and taken between the images."""
    torch.manual_seed(0)
    D = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False), nn.Flatten(0)).double()
    x, y = torch.randn(2, 5, 3, 2, 2).double()
    nn.init.zeros_(D[1].weight)
    for penalty in (wgan_gp.gradient_penalty(D, x, y), wgan_gp.divergence_penalty(D, x, y)):
        (gradient,) = torch.autograd.grad(penalty, D[1].weight)
        assert penalty.isfinite() and gradient.isfinite().all()

    x_real, x_fake = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])
    for t, x_hat in ((0.0, [3.0, 0.0]), (1.0, [0.0, 4.0]), (0.25, [2.25, 1.0])):
        t = torch.tensor([[t]])  # of |x|^2 / 2 the gradient is x
        penalty = wgan_gp.gradient_penalty(lambda x: x.square().sum(1) / 2, x_real, x_fake, t)
        assert penalty.item() == pytest.approx((math.hypot(*x_hat) - 1) ** 2)


def train_on_point_masses(kind, distance):
    """Train T on the masses 0 and `distance` -> (divergence, gradient at the generator's mass)."""
    torch.manual_seed(0)
    T = nn.Sequential(nn.Linear(1, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))
    a = torch.zeros(64, 1)
    b = torch.full((64, 1), distance)
    optimizer = torch.optim.Adam(T.parameters(), 1e-2, (0.5, 0.9), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)

    def value(x_fake):
        if kind == "SGAN":
            return math.log(2) - sgan_sn.sgan_loss(T(a), T(x_fake)) / 2
        delta = T(a) - T(x_fake)
        if kind == "WGAN-GP":
            return delta.mean()
        return gan_qp.qp_divergence(delta, gan_qp.pair_distance(a, x_fake.detach())).mean()

    for _ in range(600):
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
    distances = [0.5, 1.0, 2.0]
    kinds = ("SGAN", "WGAN-GP", "GAN-QP")
    rows = {kind: [train_on_point_masses(kind, d) for d in distances] for kind in kinds}
    with capsys.disabled():
        print("\n\ndivergence (gradient) at distance " + ", ".join(map(str, distances)))
        for kind, row in rows.items():
            print(f"{kind:8}", *[f"{value:.3f} ({slope:.2g})" for value, slope in row])
    for i, d in enumerate(distances):
        assert rows["SGAN"][i] == pytest.approx((math.log(2), 0), abs=1e-6)
        slope = 1 + d / 20  # of s d - 10 (s - 1)^2 at its maximum: a finite penalty allows s > 1
        assert rows["WGAN-GP"][i] == pytest.approx((d * slope, slope), rel=0.02)
        assert rows["GAN-QP"][i] == (pytest.approx(5 * d, rel=0.01), pytest.approx(9.5, abs=1.5))


# What the author's own scripts (128/gan_gp_l1.py, sic, and 128/gan_qp_l2.py; Keras
# 2.2.4, float64) find from the weights, images and noise of `golden`, for each iteration: d_loss of
# both steps, E T(x_f) of the generator's step and, with L1, mean |delta| / d.
GOLDEN = {
    "l1": [
        [-0.384784488725, -0.857829815665, -2.09089122897, 2.77372718788],
        [-0.807083038604, -1.32914935845, -2.66597325619, 6.16070112496],
        [-1.26981758131, -1.5120061295, -2.98387192571, 5.07273424954],
        [-1.21826333805, -1.3614660867, -3.01433622815, 6.18276952809],
        [-1.42040445476, -1.58098464945, -3.04284955155, 5.99881447098],
    ],
    "l2": [
        [-0.399045515755, -0.898921924735, -2.10280957011],
        [-0.850067617087, -1.47172381539, -2.75454882684],
        [-1.43351900337, -1.6762311124, -3.13099900643],
        [-1.38377558592, -1.57234796897, -3.21624793525],
        [-1.61383496633, -1.80590411735, -3.28965180597],
    ],
}


def golden(i, *shape):
    """Evenly spread numbers in [0, 1) that every numpy, Python 2.7's too, computes to the bit."""
    k = np.arange(1.0, math.prod(shape) + 1)
    numbers = k * (k * 0.6180339887498949 + i * 0.414213562373095) % 1
    return torch.from_numpy(numbers.reshape(shape))


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_training_steps_are_the_authors(metric, capsys, monkeypatch):
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
    _, args = arguments(monkeypatch, f"gan_qp --metric {metric} --max-channels 2048")
    optimizers = [torch.optim.Adam(net.parameters(), args.lr, args.betas) for net in (G, D)]
    found = []
    update = gan_qp.update

    def update_as_keras(optimizer, loss):
        found.append(loss.item())
        optimizer.t = getattr(optimizer, "t", 0) + 1
        optimizer.param_groups[0]["eps"] = 1e-7 / math.sqrt(1 - 0.999**optimizer.t)
        update(optimizer, loss)

    monkeypatch.setattr(gan_qp, "update", update_as_keras)
    for it in range(5):
        losses = gan_qp.train_iteration(x[it], z[it], G, D, *optimizers, args)
        found[-1] *= -1
        found.append(losses["lipschitz"].item())

    rows = np.reshape(found, (5, 4))[:, : len(GOLDEN[metric][0])]
    worst = np.abs(np.divide(rows, GOLDEN[metric]) - 1).max()
    with capsys.disabled():
        print(f"\n\n{metric}, iteration 5: {rows[-1].tolist()}, the author's {GOLDEN[metric][-1]}")
        print(f"largest relative difference in five iterations: {worst:.0e}")
    assert worst < 1e-11


# ------------------------------------------------------------------------- networks, shared code
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 512, 1024])
def test_shapes(size):
    G = gan_qp.Generator(size, 16, 256)  # the same in all three scripts
    with torch.autocast("cpu", torch.bfloat16):
        x = G(torch.randn(2, 16))
    assert x.shape == (2, 3, size, size) and x.abs().max() <= 1 and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    for module in MODULES:
        D = module.Discriminator(size, 256)
        with torch.autocast("cpu", torch.bfloat16):
            score = D(x)
        assert score.shape == (2,) and score.dtype == torch.float32
        assert not torch.equal(score, score.bfloat16().float())  # in full precision
    assert gan_qp.Discriminator(size, 256, pairwise=True)(torch.cat([x, x], 1)).shape == (2,)


def test_widths_and_settings(monkeypatch):
    for command, channels, lr in [
        ("gan_qp --img-size 512", 128, 1.6e-3),  # on a CPU
        ("wgan_gp --img-size 32 --max-channels 2048", 256, 4e-4),
        ("sgan_sn --img-size 256 --max-channels 2048", 2048, 2e-4),
    ]:
        _, args = arguments(monkeypatch, command)
        assert (args.max_channels, args.lr) == (channels, lr)
    assert gan_qp.layer_widths(512) == [32, 64, 128, 256, 512, 1024, 2048]
    D = gan_qp.Discriminator(128)
    bound = math.sqrt(6 / (25 * (64 + 128)))  # Glorot uniform: within it, and filling it
    assert D.layers[2].weight.abs().max().item() == pytest.approx(bound, rel=1e-3)


# Top-level definitions in which the scripts differ, and lines of the others that may differ.
OWN = "Discriminator pair_distance qp_divergence score_difference sgan_loss gradient_penalty"
OWN = [*OWN.split(), "divergence_penalty", "clip_weights", "train_iteration"]
OWN_LINES = re.compile(
    r"D = Discriminator\(|n_real = |args\.lr = |"
    r'flag\("--(d-steps|lr|betas|constraint|gp-weight|metric|lam|power|pairwise|no-sn)"'
)


def test_shared_code_is_the_same():
    """diff gan_qp.py wgan_gp.py shows the divergence and nothing else."""
    found = []
    for script in SCRIPTS:
        source = (HERE / f"{script}.py").read_text()
        definitions = {}
        for node in ast.parse(source).body[1:]:  # after the docstring
            name = getattr(node, "name", None) or ast.unparse(node).split("=")[0].strip()
            if name not in OWN and not name.startswith("from torch.nn.utils.parametri"):
                lines = [line.strip() for line in ast.get_source_segment(source, node).splitlines()]
                definitions[name] = [line for line in lines if not OWN_LINES.match(line)]
        found.append(definitions)
    assert {"update", "train", "save", "Generator", "parse_args"} <= found[0].keys()
    assert found[0] == found[1] == found[2]


# ------------------------------------------------------------------------------------------ data
def test_kinds_of_images(tmp_path, capsys):
    color = (200, 40, 20)
    red = Image.new("RGB", (48, 32), color)
    sideways = Image.new("RGB", (64, 64), "white")
    sideways.paste("black", (0, 0, 64, 32))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    profile = {"icc_profile": swapped}  # red and green are exchanged
    kinds = {  # name -> image, its mean color, how to save it
        "a.jpg": (red, color, {"quality": 95}),
        "b.JPEG": (red.convert("CMYK"), color, {}),
        "c.png": (red.convert("P", palette=Image.Palette.ADAPTIVE), color, {}),
        "d.bmp": (red.convert("L"), (86, 86, 86), {}),
        "e.png": (Image.new("RGBA", (48, 32), (*color, 0)), (255, 255, 255), {}),
        "j.png": (Image.new("RGB", (8, 900), color), color, {}),
        "l.png": (red, (40, 200, 20), profile),
        "m.jpg": (red.resize((500, 500)), (40, 200, 20), {**profile, "quality": 95}),
        "n.png": (red, color, {"icc_profile": b"broken"}),
        "o.jpg": (sideways, (127, 127, 127), {"exif": SIDEWAYS}),
        "p.jpg": (red, color, {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff garbage", "quality": 95}),
        "q.tif": (red.convert("LAB"), color, {}),
        "r.tif": (Image.new("LA", (48, 32), (0, 127)), (128, 128, 128), {}),
        "sub/\u732b \u00e9.webp": (red, color, {"quality": 95}),
    }
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, (image, _, options) in kinds.items():
        image.save(folder / name, **options)
    for name, alpha, expected in (("t.bmp", 0, color), ("u.bmp", 51, (244, 212, 208))):
        head = struct.pack("<2sI4xI", b"BM", 122 + 4 * 64, 122)
        head += struct.pack("<3I2H2I16x", 108, 8, 8, 1, 32, 3, 4 * 64)
        head += struct.pack("<4I52x", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        (folder / name).write_bytes(head + 64 * bytes((*color[::-1], alpha)))
        kinds[name] = (None, expected, {})  # a fourth byte that is zero everywhere is unused
    (folder / "x1.png").write_bytes((folder / "c.png").read_bytes()[:60])  # truncated
    (folder / "x2.jpg").write_bytes(b"")
    Image.new("F", (8, 8), 0.5).save(folder / "x3.tif")
    Image.new("I;16", (8, 8), 4095).save(folder / "x4.png")  # white of 12 bits, or grey of 16?
    (folder / "x5.tif").write_bytes(b"II+\0\b\0\0\0" + struct.pack("<Q", 2**62))  # an offset
    (folder / os.fsdecode(b"x6.\xe9")).write_bytes(b"")  # a name that no terminal can print

    images = data.load_images(folder, 16, tmp_path / "cache")
    said = capsys.readouterr().out
    assert images.shape == (16, 16, 16, 3) and not images.flags.writeable
    for name in ("x1.png", "x2.jpg", "x3.tif", "x4.png", "x5.tif"):
        assert f"skipped {name!r}: " in said
    assert said.count("its pixels are not 8-bit") == 2
    for (name, (_, expected, _)), image in zip(kinds.items(), images, strict=True):
        np.testing.assert_allclose(image.mean((0, 1)), expected, atol=4, err_msg=name)
    upright = images[list(kinds).index("o.jpg")]
    assert upright[:, 12:].max() < 10 and upright[:, :4].min() > 245  # black is now at the right


def test_folders_and_archives(tmp_path, cli, capsys, monkeypatch):
    """The same images, however they are packed; all other files are counted."""
    monkeypatch.chdir(tmp_path)
    folder = noise_folder(tmp_path / "synthetic", 3)  # comes before the source of that name
    noise_folder(tmp_path / "elsewhere", 2)
    (folder / "@eaDir").mkdir()
    for name in ("a.heic", "b.heic", "c.txt", "d", ".e.png", "@eaDir/f.png"):
        (folder / name).write_bytes(b"no image")
    shutil.make_archive("photos", "zip", folder)
    with zipfile.ZipFile("above.zip", "w") as archive:  # as `zip -r above.zip ../../synthetic`
        for file in folder.rglob("*.png"):
            archive.write(file, f"../../synthetic/{file.relative_to(folder)}")
    (folder / "one").symlink_to(tmp_path / "elsewhere", target_is_directory=True)

    images = data.load_images("synthetic", 8, "cache")
    assert len(images) == 5
    for name in ("photos.zip", "above.zip"):
        assert np.array_equal(data.load_images(name, 8, "cache"), images[:3])
        assert len(fid.list_images(name).names) == 3
    said = "".join(capsys.readouterr())
    kinds = "other files, not used: 2 .heic, 2 hidden, 1 .txt, 1 without an extension"
    assert said.count(kinds) == 3 and said.count("not used: 2 hidden\n") == 2, said

    assert data.load_images(folder, 8, "cache").filename == images.filename
    noise_image(9).save(folder / "0000.png")
    changed = data.load_images(folder, 8, "cache")
    assert not np.array_equal(changed, images) and np.array_equal(changed[1:], images[1:])
    monkeypatch.chdir(folder)
    assert len(fid.list_images("../synthetic").names) == 5
    (folder / "one" / "three").symlink_to(folder)  # a loop
    refused(cli("data", folder), "one/three is a link to a folder above it")
    refused(cli("fid", folder, folder), "one/three is a link to a folder above it")


def test_a_disk_that_fails_costs_no_image(cli, tmp_path, monkeypatch):
    """What cannot be read for the moment would otherwise be missing for ever."""
    photos = noise_folder(tmp_path / "photos", 128)
    for place, error, words in [
        ("PIL.Image.open", MemoryError(), ["0000.png", "MemoryError"]),
        ("pathlib.Path.read_bytes", OSError(5, "Input/output error"), ["0000.png", "output error"]),
        ("os.scandir", PermissionError(13, "Permission denied"), ["denied"]),
    ]:
        monkeypatch.setattr(place, Mock(side_effect=error))
        refused(cli("data", photos, "--cache-dir", tmp_path / "cache"), *words)
        refused(cli("fid", photos, photos, "--swd"), *words)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.npy"))


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
    assert label(data.Batches(images, 40, "cpu", seed=3)[0]) == sequence  # several epochs

    x = batches[0]
    assert x.shape == (4, 3, 4, 4) and x.dtype == torch.float32
    assert x[:, :, :, 0].eq(1).all() and x.min() >= -1

    flipping = data.Batches(images, 4, "cpu", 3, True)
    halves = [data.Batches(images, 4, "cpu", 3, True, rank, 2)[5] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), flipping[5])
    assert 8 < sum(bool(flipping[k][0, 0, 0, -1] == 1) for k in range(40)) < 32
    with pytest.raises(ValueError):
        data.Batches(images, 5, "cpu", world=2)


def test_two_preparations_at_once(tmp_path, monkeypatch):
    """What is under way, or was killed, is hidden."""
    source = ("synthetic:400", 32, tmp_path)
    draw = data.draw_face
    found = []

    def draw_while_another_prepares(i, size):
        if i == 300:
            monkeypatch.undo()
            found.extend(name for name in os.listdir(tmp_path) if name[0] != ".")
            data.load_images(*source)
        return draw(i, size)

    monkeypatch.setattr(data, "draw_face", draw_while_another_prepares)
    images = data.load_images(*source)
    whole = Path(images.filename)
    assert images.shape == (400, 32, 32, 3) and found == []
    assert os.listdir(tmp_path) == [whole.name]
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{whole.name} is damaged.*delete it"):
        data.load_images(*source)


# ------------------------------------------------------------------------------------------ runs
RUN = [*TINY, "--log-every", 2, "--sample-every", 3, "--save-every", 4, "--iters", 7]


def test_a_run_and_its_samples(cli, tmp_path, monkeypatch):
    run = tmp_path / "run"
    code, out, _ = cli("gan_qp", *RUN, "--out", run)
    assert code == 0 and "new run from iteration 1: cpu, fp32, 8 channels;" in out
    assert f"saved at iteration 7 of 7 in {run}; --resume --iters N continues" in out
    assert set(os.listdir(run)) == {"args.json", "log.jsonl", "real.png", "samples", "last.pt"}
    assert sorted(os.listdir(run / "samples")) == ["000003.png", "000006.png", "000007.png"]
    assert [row["iter"] for row in log_of(run)] == [1, 2, 3, 4, 6, 7]
    assert set(log_of(run)[0]) == {"iter", "d_loss", "g_loss", "lipschitz", "img_per_sec", "sec"}
    args = json.loads((run / "args.json").read_text())
    assert args["img_size"] == 16 and {"python", "torch", "device_name"} <= args.keys()
    assert Image.open(run / "samples" / "000007.png").size == (9 * 18 + 2, 9 * 18 + 2)

    sampling = ["--sample", run / "last.pt", "--device", "cpu"]
    for name in ("x.GIF", "set_v1.0"):  # a picture, a folder
        assert cli("gan_qp", *sampling, "--out", tmp_path / name, "--num-samples", 5)[0] == 0
    assert Image.open(tmp_path / "x.GIF").size == (3 * 18 + 2, 2 * 18 + 2)
    assert len(list((tmp_path / "set_v1.0").glob("*.png"))) == 5
    refused(cli("gan_qp", *sampling, "--out", tmp_path / "set_v1.0"), "exists", "name a new folder")
    refused(cli("gan_qp", *RUN, "--out", run), "--resume")
    monkeypatch.setenv("RANK", "1")  # under torchrun the first process samples alone
    assert cli("gan_qp", *sampling, "--out", tmp_path / "twice")[0] == 0
    assert not (tmp_path / "twice").exists()
    monkeypatch.undo()

    off = ["--log-every", 0, "--sample-every", 0, "--save-every", 0]
    assert cli("gan_qp", *RUN, *off, "--iters", 3, "--out", tmp_path / "off")[0] == 0
    assert [row["iter"] for row in weights(tmp_path / "off" / "last.pt")["log"]] == [3]


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumption(script, cli, tmp_path):
    """To the bit, with the flags of the run; what is typed wins."""
    whole = tmp_path / "whole"
    split = tmp_path / "split"
    flags = [*RUN, "--flip"]
    assert cli(script, *flags, "--out", whole)[0] == 0
    assert cli(script, *flags, "--iters", 5, "--out", split, "--resume")[0] == 0  # starts
    with open(split / "log.jsonl", "a") as file:
        file.write('{"iter": 6, "d_lo')  # torn
    resume = ["--out", split, "--resume", "--device", "cpu"]
    assert cli(script, *resume, "--iters", 7)[0] == 0
    assert cli(script, *resume)[0] == 0  # at its end
    assert_same(weights(whole / "last.pt"), weights(split / "last.pt"))
    rows = sorted(log_of(split), key=lambda row: row["sec"])
    assert [row["iter"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]

    # by a renamed copy, with other flags
    (tmp_path / "my_gan.py").write_text((HERE / f"{script}.py").read_text())
    typed = ["--lr", 0.5, "--betas", 0.25, 0.75, "--iters", 8]
    assert "continuing from iteration 8:" in cli(tmp_path / "my_gan", *resume, *typed)[1]
    assert weights(split / "last.pt")["args"]["lr"] == 0.5
    for name in ("opt_G", "opt_D"):
        (group,) = weights(split / "last.pt")[name]["param_groups"]
        assert group["lr"] == 0.5 and list(group["betas"]) == [0.25, 0.75]


@pytest.mark.parametrize("command", [*SCRIPTS, "gan_qp --pairwise"])
def test_the_loop_waits_for_nothing_and_leaves_out_no_batch(command, cli, tmp_path, monkeypatch):
    """A program waits for a GPU when it reads a number from a tensor: only at logs and saves."""

    class Reads(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    script, *pairwise = command.split()
    counts = []
    batches = []
    fetch = data.Batches.fetch
    monkeypatch.setattr(data.Batches, "fetch", lambda *a: batches.append(a[1]) or fetch(*a))
    for iters in (3, 9):
        batches.clear()
        out = tmp_path / str(iters)
        with Reads() as reads:
            assert cli(script, *TINY, *pairwise, "--iters", iters, "--out", out)[0] == 0
        counts.append(reads.n)
        n = weights(out / "last.pt")["args"]["d_steps"] + len(pairwise)
        assert batches == list(range(n * iters))  # every image comes before any comes twice
    assert counts[0] == counts[1] > 0


def test_average_of_the_generator(cli, tmp_path):
    """A power function of the iteration: with --average 1/2, iterations 1, 2, 3 weigh 1, 3, 5."""

    def run(iters, average):
        out = tmp_path / f"{iters}-{average}"
        assert cli("gan_qp", *TINY, "--average", average, "--iters", iters, "--out", out)[0] == 0
        return weights(out / "last.pt")

    one, two, three = (run(iters, 0.5)["G"]["layers.0.weight"] for iters in (1, 2, 3))
    average = weights(tmp_path / "3-0.5" / "last.pt")["G_ema"]
    torch.testing.assert_close(average["layers.0.weight"], (one + 3 * two + 5 * three) / 9)
    assert torch.equal(run(3, 0)["G_ema"]["layers.0.weight"], three)

    G = gan_qp.Generator(16, 8, 8).eval()
    G.load_state_dict(average)
    torch.manual_seed(0)
    features = G.linear(torch.randn(10**5, 8))  # batch norm has the averaged weights' statistics
    torch.testing.assert_close(G.norm.running_mean, features.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(G.norm.running_var, features.var(0), atol=0.1, rtol=0.1)
    z = torch.randn(1, 8, generator=torch.Generator().manual_seed(5))
    image = gan_qp.generate(G, z)[0].permute(1, 2, 0)
    sampling = ["--sample", tmp_path / "3-0.5" / "last.pt", "--num-samples", 1, "--seed", 5]
    assert cli("gan_qp", *sampling, "--device", "cpu", "--out", tmp_path / "x")[0] == 0
    assert np.array_equal(Image.open(tmp_path / "x" / "00000.png"), image)


REFUSED = {
    "--img-size 100": "power of two",
    "--iters 0": "--iters",
    "--batch-size 1": "--batch-size",
    "--seed -1": "--seed",
    "--max-channels 4 --img-size 512": "64",
    "--data torchvision:Nothing": "torchvision:Nothing",
    "--data damaged.zip": "zip",
    "--data empty": "no images",
    "--data bad": "none of 1 images can be read",
    "--data . --out run": "inside",
    "--data . --cache-dir cache": "inside",
    "--sample nothing.pt": "nothing.pt",
    "--fid-every 1 --fid-weights nothing.pth": "--fid-weights",
}


def test_mistakes_get_one_line_and_no_checkpoint_is_executed(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bad/a.png", "empty/a.heic"):
        Path(name).parent.mkdir()
        Path(name).write_bytes(b"torn")
    Path("damaged.zip").write_bytes(bytes(46) + b"PK\5\6\0\0\0\0\1\0\1\0.\0\0\0" + bytes(6))
    for flags, word in REFUSED.items():
        refused(cli("gan_qp", *TINY, "--out", tmp_path.parent / "refused", *flags.split()), word)
    refused(cli("gan_qp", *TINY, "--data", "", "--out", tmp_path.parent / "refused"), "a folder")
    for flags, words in {"--lr nan": "learning rate", "--betas 0.5 1": "beta"}.items():
        with pytest.raises(ValueError, match=words):  # torch's own
            cli("gan_qp", *TINY, "--out", tmp_path.parent / "refused", *flags.split())
    assert not (tmp_path.parent / "refused").exists()
    torch.save({"iter": 1, "args": os.system}, "last.pt")
    for flags in (["--sample", "last.pt"], ["--resume", "--out", "."]):
        with pytest.raises(pickle.UnpicklingError):
            cli("gan_qp", *flags)


@pytest.mark.parametrize("failure", ["loss", "gradient", "disk"])
def test_a_failure_leaves_the_last_checkpoint_whole(failure, cli, tmp_path, monkeypatch):
    last = tmp_path / "last.pt"
    assert cli("gan_qp", *TINY, "--iters", 1, "--out", tmp_path)[0] == 0
    state = weights(last)
    if failure == "loss":
        state["D"]["linear.weight"].fill_(1e20)
    if failure == "gradient":  # of a loss that is finite
        state["opt_G"]["state"][0]["exp_avg"].fill_(math.nan)
    torch.save(state, last)
    before = last.read_bytes()

    def half(checkpoint, path):
        Path(path).write_bytes(before[:5000])
        raise OSError(28, "No space left on device")

    if failure == "disk":
        monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError if failure == "disk" else FloatingPointError):
        cli("gan_qp", "--iters", 2, "--resume", "--out", tmp_path)
    assert last.read_bytes() == before
    assert not list(tmp_path.rglob(".*"))


def in_the_third_iteration(monkeypatch, event):
    fetch = data.Batches.fetch

    def fetch_in_trouble(batches, k):
        if k == 5:
            event()
        return fetch(batches, k)

    monkeypatch.setattr(data.Batches, "fetch", fetch_in_trouble)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_ends_the_run(name, cli, tmp_path, monkeypatch):
    in_the_third_iteration(monkeypatch, lambda: signal.raise_signal(getattr(signal, name)))
    code, said, _ = cli("gan_qp", *TINY, "--iters", 90_003, "--out", tmp_path)
    assert code == 0 and "saved at iteration 3 of 90003" in said and "; --resume continues" in said
    first, last = log_of(tmp_path)
    left = gan_qp.timedelta(seconds=round(90_000 * (last["sec"] - first["sec"]) / 2))
    assert "\niter 3  d_loss" in said and f"  {left} to iter 90003\n" in said
    assert weights(tmp_path / "last.pt")["iter"] == last["iter"] == 3
    assert (tmp_path / "samples" / "000003.png").exists()


def test_a_terminal_that_closes(cli, tmp_path, monkeypatch):
    """Then print fails, but the run is saved. With nohup it goes on."""
    hang_up = Mock(side_effect=lambda: signal.raise_signal(signal.SIGHUP))
    in_the_third_iteration(monkeypatch, lambda: (sys.stdout.close(), hang_up()))
    with pytest.raises(ValueError, match="closed file"):
        cli("gan_qp", *TINY, "--out", tmp_path)
    assert weights(tmp_path / "last.pt")["iter"] == log_of(tmp_path)[-1]["iter"] == 3
    monkeypatch.undo()
    in_the_third_iteration(monkeypatch, hang_up)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert "iteration 4 of 4" in cli("gan_qp", *TINY, "--iters", 4, "--out", tmp_path / "nohup")[1]


def test_a_second_ctrl_c_ends_at_once(cli, tmp_path, monkeypatch):
    press = Mock(side_effect=lambda: signal.raise_signal(signal.SIGINT))
    in_the_third_iteration(monkeypatch, lambda: (press(), press()))
    with pytest.raises(KeyboardInterrupt):
        cli("gan_qp", *TINY, "--out", tmp_path)
    assert press.call_count == 2


def test_two_machines_share_each_batch(cli, cache, tmp_path):
    """Only the first sees the checkpoint. Each prepares the images and takes its half of them."""
    out = tmp_path / "0" / "run"
    assert cli("wgan_gp", *TINY, "--d-steps", 1, "--iters", 1, "--out", out)[0] == 0
    before = weights(out / "last.pt")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]  # a free one
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_RANK": 0}
    (tmp_path / "1").mkdir()
    flags = "--iters 2 --out run --resume --device cpu --cache-dir cache".split()
    words = [HERE / "wgan_gp.py", *flags]
    machines = [start(*words, cwd=tmp_path / str(rank), RANK=rank, **group) for rank in (0, 1)]
    said = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "from iteration 2:" in said[0] and not (tmp_path / "1" / "run").exists()
    assert "preparing 12 images" in said[0] and "preparing 12 images" in said[1]

    # the critic's gradient, computed here; with beta1 = 0, Adam's exp_avg is the gradient
    G = wgan_gp.Generator(16, 8, 8)
    D = wgan_gp.Discriminator(16, 8)
    G.load_state_dict(before["G"])
    D.load_state_dict(before["D"])
    torch.manual_seed(np.random.SeedSequence((0, 2)).generate_state(1).item())
    z = torch.randn(4, 8).chunk(2)
    torch.randn(4, 8)  # for the generator's update
    t = torch.rand(4, 1, 1, 1).chunk(2)
    images = data.load_images("synthetic:12", 16, cache)
    loss = 0
    for rank in (0, 1):
        x_real = data.Batches(images, 4, "cpu", rank=rank, world=2)[1]
        x_fake = G(z[rank]).detach()
        penalty = wgan_gp.gradient_penalty(D, x_real, x_fake, t[rank])
        loss += ((D(x_fake) - D(x_real)).mean() + 10 * penalty) / 2
    for i, gradient in enumerate(torch.autograd.grad(loss, list(D.parameters()))):
        found = weights(out / "last.pt")["opt_D"]["state"][i]["exp_avg"]
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)


def test_two_processes_stop_together(cache, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    flags = ["--iters", 10**6, "--save-every", 5, "--cache-dir", cache, "--out", tmp_path]
    process = start(*launch, HERE / "gan_qp.py", *TINY, *flags)
    while not (tmp_path / "last.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    said = process.communicate(timeout=60)[0]
    assert said.count("saved at iteration") == 1, said
    assert weights(tmp_path / "last.pt")["iter"] == log_of(tmp_path)[-1]["iter"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda(script, cli, monkeypatch, tmp_path):
    flags = [*TINY, "--device", "cuda", "--out", tmp_path / "run"]
    assert cli(script, *flags, "--iters", 3)[0] == 0
    assert cli(script, "--out", tmp_path / "run", "--resume", "--iters", 5)[0] == 0
    saved = weights(tmp_path / "run" / "last.pt")
    native = torch.cuda.get_device_capability() >= (8, 0)  # a T4 or V100 only emulates bf16
    assert saved["iter"] == 5 and saved["args"]["precision"] == ("bf16" if native else "fp32")
    sampling = ["--sample", tmp_path / "run" / "last.pt"]
    assert cli(script, *sampling, "--out", tmp_path / "x.png")[0] == 0
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 0

    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    on_cpu = data.Batches(images, 4, "cpu", flip=True)
    resident = data.Batches(images, 4, "cuda", flip=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    streamed = data.Batches(images, 4, "cuda", flip=True)
    assert resident.resident is not None and streamed.resident is None
    for k in (0, 1, 2, 9):
        # CUDA multiplies by 1 / 127.5 where the CPU divides, so the last bit may differ
        torch.testing.assert_close(resident[k].cpu(), on_cpu[k], rtol=0, atol=1e-6)
        assert torch.equal(resident[k], streamed[k])


# ----------------------------------------------------------------------------------- FID and SWD
def test_frechet_distance_in_closed_form():
    mu = np.array([1.0, 2.0, 3.0])
    a = np.diag([1.0, 4.0, 9.0])
    b = np.diag([4.0, 0.0, 1.0])
    assert fid.frechet_distance(mu, a, mu + 1, b) == pytest.approx(3 + 1 + 4 + 4)
    assert not np.isfinite(fid.frechet_distance(mu * np.nan, a, mu, b))
    with pytest.raises(ValueError, match="do not match"):
        fid.frechet_distance(mu, a, mu[:1], a)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 64)) @ rng.normal(size=(64, 64))
    y = rng.normal(size=(300, 64)) + 5
    s, t, few = ((some.mean(0), np.cov(some.T)) for some in (x, y, x[:10]))  # few: singular
    roots = np.sqrt(np.linalg.eigvals(s[1] @ t[1]).real.clip(0)).sum()
    expected = ((s[0] - t[0]) ** 2).sum() + np.trace(s[1] + t[1]) - 2 * roots
    assert fid.frechet_distance(*s, *t) == pytest.approx(expected, rel=1e-6)
    assert 0 <= fid.frechet_distance(*few, *few) < 1e-6 * np.trace(few[1])
    assert fid.frechet_distance(*s, *few) == pytest.approx(fid.frechet_distance(*few, *s), rel=1e-6)

    stats = fid.FeatureStats(64)  # of batches, they are those of the whole
    for batch in torch.from_numpy(x).split(70):
        stats.update(batch)
    assert stats.n == 300
    np.testing.assert_allclose(stats.mean, s[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(stats.cov, s[1], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="features"):
        stats.update(np.zeros((5, 1)))


def test_features_and_distance_are_those_of_pytorch_fid(inception_file, tmp_path, monkeypatch, cli):
    peer = pytest.importorskip("pytorch_fid.inception", reason="needs pytorch-fid")
    score = pytest.importorskip("pytorch_fid.fid_score")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: weights(inception_file))
    net = peer.InceptionV3([3]).eval()
    inception = fid.load_inception(inception_file)
    images = np.stack([np.asarray(data.draw_face(i, 80)) for i in range(24)])
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = net(x / 255)[0].flatten(1)
    ours = inception(x)
    assert theirs.std() > 0.1 and (ours - theirs).norm() < 1e-4 * theirs.norm()

    one, two = theirs.double().numpy().reshape(2, 12, -1)
    statistics = [one.mean(0), np.cov(one.T), two.mean(0), np.cov(two.T)]
    small = [values[..., :200] if values.ndim == 1 else values[:200, :200] for values in statistics]
    theirs = score.calculate_frechet_distance(*small)  # of all 2,048 it takes them a long time
    assert fid.frechet_distance(*small) == pytest.approx(theirs, rel=1e-3)

    # their statistics are read by us, and ours by them
    own = ["--weights", inception_file, "--device", "cpu"]
    np.save(tmp_path / "a.npy", images[:12])
    np.savez(tmp_path / "b.npz", mu=statistics[2], sigma=statistics[3])
    code, out, err = cli("fid", tmp_path / "a.npy", tmp_path / "b.npz", *own)
    assert code == 0 and "not reliable" in err
    assert float(out) == pytest.approx(fid.frechet_distance(*statistics), rel=1e-3)
    saved = tmp_path / "a.npz"
    assert cli("fid", tmp_path / "a.npy", "--save-stats", saved, *own)[0] == 0
    mu, sigma = score.compute_statistics_of_path(str(saved), None, 1, 2048, "cpu")
    np.testing.assert_allclose(mu, statistics[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sigma, statistics[1], rtol=1e-2, atol=1e-2)
    refused(cli("fid", saved, tmp_path / "b.npz", "--clean"), "resized bilinear, not clean")


def test_resizing_is_that_of_clean_fid():
    resize = pytest.importorskip("cleanfid.resize", reason="needs clean-fid")
    for shape in ((40, 50), (400, 350)):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        x = torch.from_numpy(image).permute(2, 0, 1)[None]
        ours = fid.resize(x, clean=True)[0] * 128 + 128
        theirs = resize.build_resizer("clean")(image)
        np.testing.assert_allclose(ours.permute(1, 2, 0), theirs, atol=0.02)


def test_sets_of_images(tmp_path, cli, inception_file, monkeypatch):
    """Pixels as they are in the file, whatever the metadata; others are counted, or refused."""
    monkeypatch.chdir(tmp_path)
    noise_folder(Path("set"), 2)
    clear = noise_image(2)
    clear.putalpha(0)
    clear.save("set/0002.png", exif=SIDEWAYS)
    Path("set/0003.png").write_bytes(b"broken")
    Image.fromarray(np.full((32, 48), 32896, np.uint16)).save("set/0004.png")
    Path("set/a.txt").write_text("no image")
    shutil.make_archive("set", "zip", "set")
    for path in ("set", "set.zip"):
        images = list(fid.read_all(fid.list_images(path), range(5)))
        for i, image in zip(range(3), images, strict=True):
            assert np.array_equal(image, np.asarray(noise_image(i)))
    code, _, err = cli("fid", "set", "set.zip", "--weights", inception_file, "--device", "cpu")
    assert code == 0 and "not used: 1 .txt" in err and "skipped 0003.png" in err
    assert "skipped 0004.png" in err and "8-bit" in err and "set.zip: 3 images" in err

    none = ["--weights", "none.pth"]  # mistakes are found before anything is measured
    np.savez("set.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    np.save("set.npy", np.zeros((3, 8, 8, 3), np.uint8))
    for kind, part in [
        ("zip", b"PK\1\2"),
        ("npz", b"PK\1\2"),
        ("npz", b"NUMPY"),
        ("npy", b"NUMPY"),
    ]:
        pieces = Path(f"set.{kind}").read_bytes().split(part)
        for damaged in (pieces[0], b"#####".join(pieces)):  # torn, changed
            Path(f"damaged.{kind}").write_bytes(damaged)
            refused(cli("fid", "set", f"damaged.{kind}", *none), f"damaged.{kind}")
    np.savez("other.npz", mean=np.zeros(3))
    np.save("float.npy", np.zeros((3, 8, 8, 3)))
    for flags, word in {
        "set": "two sets, or one and --save-stats FILE.npz, not 1",
        "set set": "--weights",
        "set other.npz": "mu and sigma",
        "set float.npy": "float64",
        "set set.npz --swd": "not statistics",
        "set --save-stats nowhere/x.npz": "nowhere/x.npz",
        "set --save-stats x.txt": ".npz",
    }.items():
        refused(cli("fid", *flags.split(), *none), word)


def test_fid_in_training(inception_file, cli, tmp_path, monkeypatch):
    flags = [*TINY, "--iters", 3]
    measured = ["--fid-every", 2, "--fid-samples", 6, "--fid-weights", inception_file]
    assert cli("gan_qp", *flags, "--out", tmp_path / "off")[0] == 0
    assert cli("gan_qp", *flags, *measured, "--out", tmp_path / "on")[0] == 0
    log = [row for row in log_of(tmp_path / "on") if "fid" in row]
    assert [row["iter"] for row in log] == [2, 3] and all(row["fid"] > 0 for row in log)
    assert_same(weights(tmp_path / "on" / "last.pt"), weights(tmp_path / "off" / "last.pt"))
    best = min(log, key=lambda row: row["fid"])["iter"]
    assert weights(tmp_path / "on" / "best.pt")["iter"] == best
    assert weights(tmp_path / "on" / "last.pt")["log"][1:] == log

    # all else comes before an FID, which can fail, and which a signal ends
    run = tmp_path / "run"
    flags += [*measured, "--fid-samples", 65, "--iters", 9, "--sample-every", 2, "--out", run]
    measure = Mock(side_effect=MemoryError)
    monkeypatch.setattr(fid.Inception, "forward", measure)
    with pytest.raises(MemoryError):
        cli("gan_qp", *flags)
    assert os.listdir(run / "samples") == ["000002.png"]
    measure.side_effect = lambda images: signal.raise_signal(signal.SIGINT) or torch.rand(64, 2048)
    assert "saved at iteration 5 of 9" in cli("gan_qp", "--resume", *flags)[1]
    assert measure.call_count == 2 and not any("fid" in row for row in log_of(run))


def test_sliced_wasserstein_distance_of_shifted_noise():
    """A shift t in D dimensions is |t| Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)) on a random line."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, 12)).astype(np.float32)
    shift = rng.normal(size=12).astype(np.float32)
    on_a_line = np.linalg.norm(shift) * math.gamma(6) / (math.sqrt(math.pi) * math.gamma(6.5))
    distance = fid.sliced_wasserstein(points, points + shift, directions=4000)
    assert distance == pytest.approx(on_a_line, rel=0.03)


def test_swd_of_sets(cli, tmp_path):
    """Zero for the same images in any order. The levels add up to the image."""
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    large, small = fid.laplacian_pyramid(x)
    enlarged = torch.zeros_like(x)
    enlarged[:, :, ::2, ::2] = small
    torch.testing.assert_close(large + 4 * fid.blur(enlarged), x)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "reversed.npy", images[::-1])
    np.save(tmp_path / "blurred.npy", fid.blur(x).permute(0, 2, 3, 1).round().byte().numpy())
    np.save(tmp_path / "odd.npy", images[:, :24, :24])
    np.save(tmp_path / "half.npy", images[:150, :16, :16])

    code, out, _ = cli("fid", tmp_path / "a.npy", tmp_path / "reversed.npy", "--swd")
    assert code == 0 and out == "32 0.000\n16 0.000\nmean 0.000\n"
    code, out, _ = cli("fid", tmp_path / "a.npy", tmp_path / "blurred.npy", "--swd")
    assert code == 0 and float(out.split()[1]) > 50
    refused(cli("fid", tmp_path / "a.npy", tmp_path / "odd.npy", "--swd"), "odd.npy: --swd needs")
    refused(cli("fid", tmp_path / "a.npy", tmp_path / "half.npy", "--swd"), "32 and 16", "data.py")


def test_readme(cli, tmp_path, monkeypatch):
    """The step to copy is train_iteration's; its average, that of --average. All flags exist."""
    monkeypatch.chdir(tmp_path)
    assert cli("gan_qp", *TINY, "--iters", 1, "--out", "runs/gan_qp-32")[0] == 0
    text = (HERE / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    torch.manual_seed(0)
    exec(snippets[0], copied := {})
    torch.manual_seed(0)
    exec(snippets[0].split("# each iteration")[0], ours := {})
    G, D, opt_G, opt_D, x_real = (ours[name] for name in "G D opt_G opt_D x_real".split())
    _, args = arguments(monkeypatch, "gan_qp --d-steps 1")
    gan_qp.train_iteration([x_real], torch.randn(2, 64, 16), G, D, opt_G, opt_D, args)
    for name in ("opt_G", "opt_D"):  # Adam's first average is the gradient, as the beta is 0
        assert_same(copied[name].state_dict()["state"], ours[name].state_dict()["state"])
    assert copied["G_ema"].avg_fn(torch.zeros(1), torch.ones(1), 9) == pytest.approx(1 - 0.9**10)
    exec(snippets[1], {})
    assert np.asarray(Image.open("grid.png")).mean() > 50  # not black
    helps = "".join(cli(program, "-h")[1] for program in [*SCRIPTS, "fid"])
    flags, known = (set(re.findall(r"--[a-z][a-z-]+", words)) for words in (text, helps))
    assert flags <= known | {"--nproc-per-node"}  # torchrun's
