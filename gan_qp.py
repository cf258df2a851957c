"""GAN-QP in one file: a quadratic potential, no Lipschitz constraint, no vanishing gradient.

    discriminator   max over T of   E[ delta - delta^2 / (2 lambda d) ]
    generator       min over G of   E[ delta ]

Here delta = T(x_r) - T(x_f) is the difference of the scores of a real and a generated image,
d is the mean absolute difference of the two images, and lambda = 10.

    python gan_qp.py --img-size 128 --data photos/       train on a folder or a .zip
    python gan_qp.py --out runs/gan_qp-128 --resume      continue after Ctrl-C or a crash
    python gan_qp.py --sample runs/gan_qp-128/last.pt --out grid.png
    torchrun --nproc-per-node 8 gan_qp.py --img-size 512 --data photos/

Jianlin Su, "GAN-QP: A Novel GAN Framework without Gradient Vanishing and Lipschitz Constraint",
arXiv 1811.07296.
"""

import argparse
import copy
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import update_bn

import data
import fid

SCRIPT = Path(__file__).stem
RANK = int(os.environ.get("RANK", 0))  # which of the WORLD processes this is, as torchrun says
WORLD = int(os.environ.get("WORLD_SIZE", 1))
NORM = {"eps": 1e-3, "momentum": 0.01}  # batch norm of Keras, whose momentum 0.99 is 0.01 here


# -------------------------------------------------------------------------------------- networks
def layer_widths(img_size, max_channels=2048):
    """Channels of the hidden layers: [64, 128, 256, 512, 1024] at 128 px, 8 * img_size at most."""
    if img_size not in (16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"--img-size must be a power of two from 16 to 1024, not {img_size}")
    halvings = int(math.log2(img_size)) - 3
    widest = min(8 * img_size, max_channels)
    if widest < 2**halvings:
        raise ValueError(f"--max-channels must be at least {2**halvings} at {img_size} px")
    return [widest // 2**i for i in range(halvings, -1, -1)]


def glorot_init(module):
    """Glorot uniform weights and zero biases: the defaults of Keras, used in the paper."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """Standard normal noise (B, z_dim) -> images (B, 3, img_size, img_size) in [-1, 1]."""

    def __init__(self, img_size, z_dim=128, max_channels=2048):
        super().__init__()
        widths = layer_widths(img_size, max_channels)[::-1]
        self.linear = nn.Linear(z_dim, 16 * widths[0])
        self.norm = nn.BatchNorm1d(16 * widths[0], **NORM)

        up = {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1}
        layers = []
        for wide, narrow in itertools.pairwise(widths):
            layers.append(nn.ConvTranspose2d(wide, narrow, **up))
            layers.append(nn.BatchNorm2d(narrow, **NORM))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.ConvTranspose2d(widths[-1], 3, **up))
        self.layers = nn.Sequential(*layers)
        self.apply(glorot_init)

    def forward(self, z):
        x = F.relu(self.norm(self.linear(z)))
        x = x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # channels last without a copy
        return torch.tanh(self.layers(x).to(z.dtype))


class Discriminator(nn.Module):
    """Images (B, 3, img_size, img_size) in [-1, 1] -> raw scores (B,).

    With pairwise=True it takes two images, concatenated to (B, 6, img_size, img_size).
    """

    def __init__(self, img_size, max_channels=2048, pairwise=False):
        super().__init__()
        widths = layer_widths(img_size, max_channels)
        channels = 6 if pairwise else 3
        conv = {"kernel_size": 5, "stride": 2, "padding": 2, "bias": False}
        layers = [nn.Conv2d(channels, widths[0], **conv), nn.LeakyReLU(0.2, inplace=True)]
        for narrow, wide in itertools.pairwise(widths):
            layers.append(nn.Conv2d(narrow, wide, **conv))
            layers.append(nn.BatchNorm2d(wide, **NORM))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(16 * widths[-1], 1, bias=False)
        self.apply(glorot_init)

    def forward(self, x):
        features = self.layers(x).permute(0, 2, 3, 1).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # fp32: scores are subtracted
            return self.linear(features.to(x.dtype)).squeeze(1)


# -------------------------------------------------------------------------------- the divergence
def pair_distance(x_real, x_fake, metric="l1"):
    """Distance of the two images of each pair: (B, ...), (B, ...) -> (B,).

    metric: "l1", the mean absolute difference, or "l2", the root of the mean square.
    Raises ValueError for shapes that differ.
    """
    if x_real.shape != x_fake.shape:
        raise ValueError(f"images {tuple(x_real.shape)} and {tuple(x_fake.shape)} are not pairs")
    difference = (x_real - x_fake).flatten(1)
    if metric == "l1":
        return difference.abs().mean(1)
    if metric == "l2":
        return difference.square().mean(1).sqrt()
    raise ValueError(f"metric must be l1 or l2, not {metric}")


def qp_divergence(delta, distance, lam=10.0, power=2):
    """The integrand whose mean the discriminator maximises: (B,), (B,) -> (B,).

    delta - delta^k / (k (lam d)^(k - 1)), where delta = T(x_r) - T(x_f), d is the distance of the
    pair, and the power k is 2 (the paper's), 4 or 6. Its maximum is lam d (1 - 1/k), which it
    reaches at delta = lam d. Only the discriminator may use it: the generator minimises the mean
    of delta, since the second term would pull generated images towards real ones pixel by pixel.
    Raises ValueError for shapes that differ, since (B, 1) and (B,) would broadcast to (B, B).
    """
    if delta.shape != distance.shape:
        raise ValueError(f"delta {tuple(delta.shape)} and distance {tuple(distance.shape)} differ")
    scale = lam * distance.clamp_min(1e-4)  # d is zero for two equal images
    return delta - delta**power / (power * scale ** (power - 1))


def score_difference(D, x_real, x_fake, pairwise):
    """delta of each pair, (B,): T(x_r) - T(x_f); with pairwise, T(x_r, x_f) - T(x_f, x_r)."""
    if pairwise:
        return D(torch.cat([x_real, x_fake], 1)) - D(torch.cat([x_fake, x_real], 1))
    return D(x_real) - D(x_fake)


def discriminator_loss(D, x_real, x_fake, args):
    """-> loss to minimise, estimate of the divergence, mean of |delta| / d: three scalars."""
    delta = score_difference(D, x_real, x_fake, args.pairwise)
    distance = pair_distance(x_real, x_fake, args.metric)
    divergence = qp_divergence(delta, distance, args.lam, args.power).mean()
    lipschitz = (delta.abs() / distance.clamp_min(1e-4)).mean()
    return -divergence, divergence, lipschitz


def generator_loss(D, x_real, x_fake, args):
    """-> loss to minimise: the mean of delta, or the part of it that depends on the generator."""
    if args.pairwise:
        return score_difference(D, x_real, x_fake, pairwise=True).mean()
    return -D(x_fake).mean()


# -------------------------------------------------------------------------------------- training
def train_iteration(it, state, batches, args):
    """Iteration `it` (from 1): args.d_steps discriminator updates, then one generator update.

    state: networks and optimizers, as `build` makes them; batches: a data.Batches.
    Returns the last losses by name, as scalar tensors, without waiting for the GPU.
    """
    G = state["G"]
    D = state["D"]
    device = batches.device
    first = (it - 1) * (args.d_steps + 1)  # number of its first batch
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # all randomness follows from the seed and `it`, so that a run can be resumed exactly
    torch.manual_seed(int(np.random.SeedSequence((args.seed, it)).generate_state(1)[0]))

    def noise():  # this process's part of it: (batch_size / WORLD, z_dim)
        return torch.randn(args.batch_size, args.z_dim, device=device).chunk(WORLD)[RANK]

    # discriminator: tell real from generated images
    for step in range(args.d_steps):
        x_real = batches[first + step]
        with amp:
            with torch.no_grad():
                x_fake = G(noise())
            d_loss, divergence, lipschitz = discriminator_loss(D, x_real, x_fake, args)
        update(state["opt_D"], d_loss)

    # generator: make images that score like real ones
    D.requires_grad_(False)  # its gradients would be wasted work
    x_real = batches[first + args.d_steps]  # only gan_qp.py --pairwise uses it
    with amp:
        g_loss = generator_loss(D, x_real, G(noise()), args)
    update(state["opt_G"], g_loss)
    D.requires_grad_(True)

    # average of the generator's weights; bias-corrected, so that the initial ones do not count
    if args.ema:
        share = (1 - args.ema) / (1 - args.ema**it)
        for average, weight in zip(state["G_ema"].parameters(), G.parameters(), strict=True):
            average.detach().lerp_(weight.detach(), share)
    losses = {"d_loss": d_loss, "g_loss": g_loss, "divergence": divergence, "lipschitz": lipschitz}
    return {name: loss.detach() for name, loss in losses.items()}


def update(optimizer, loss):
    """One step of `optimizer` down the gradient of `loss`, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    if WORLD > 1:
        # not DistributedDataParallel, which does not see the gradient within a gradient penalty
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad /= WORLD
            torch.distributed.all_reduce(parameter.grad)
    optimizer.step()


def build(args, device):
    """Returns the state of a new run. Without --ema, G_ema is G itself."""
    torch.manual_seed(args.seed)
    G = Generator(args.img_size, args.z_dim, args.max_channels)
    D = Discriminator(args.img_size, args.max_channels, args.pairwise)
    G_ema = copy.deepcopy(G) if args.ema else G
    if WORLD > 1 and device.type == "cuda":
        # in place; a separate G_ema keeps plain batch norm, since the first process runs it alone
        nn.SyncBatchNorm.convert_sync_batchnorm(G)
        nn.SyncBatchNorm.convert_sync_batchnorm(D)
    for network in (G, D, G_ema):
        network.to(device, memory_format=torch.channels_last)
    adam = {"lr": args.lr, "betas": args.betas, "eps": 1e-7, "fused": True}  # Keras' epsilon
    opt_G = torch.optim.Adam(G.parameters(), **adam)
    opt_D = torch.optim.Adam(D.parameters(), **adam)
    return {"G_ema": G_ema, "G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}


def train(args, checkpoint):
    """Train from a checkpoint (of iteration 0 for a new run) to args.iters, or until a signal."""
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # fp32 means fp32, not TF32
    if WORLD > 1:
        # an hour: the others wait while the first process prepares images or measures FID
        torch.distributed.init_process_group(timeout=timedelta(hours=1))

    data.check_outside(args.out, args.data)
    state = build(args, device)
    if checkpoint["iter"] > 0:
        restore(state, checkpoint, args)
    if RANK > 0:
        torch.distributed.barrier()  # until the first process has prepared the images
    images = data.load_images(args.data, args.img_size, args.cache_dir, quiet=RANK > 0)
    if WORLD > 1 and RANK == 0:
        torch.distributed.barrier()
    batches = data.Batches(images, args.batch_size, device, args.seed, args.flip, RANK, WORLD)
    run = Run(args, state, images, checkpoint) if RANK == 0 else None
    every = {"log": args.log_every, "grid": args.sample_every, "save": args.save_every}
    every["fid"] = args.fid_every
    signals = catch_signals()

    for it in range(checkpoint["iter"] + 1, args.iters + 1):
        losses = train_iteration(it, state, batches, args)

        due = {what for what, n in every.items() if n and (it % n == 0 or it == args.iters)}
        if it == checkpoint["iter"] + 1:
            due.add("log")
        if it == 100:
            due.add("grid")
        if not due and (WORLD > 1 or not signals):  # several processes can only stop together
            continue

        # up to here nothing waits for the GPU
        values = torch.stack([*losses.values(), torch.tensor(float(len(signals)), device=device)])
        if WORLD > 1:
            torch.distributed.all_reduce(values)
            values /= WORLD
        total = values.sum() + sum(weight.sum() for weight in state["G"].parameters())
        if not total.isfinite():
            raise ValueError("the loss is not finite: go on with --resume and a lower --lr")
        *values, stop = values.tolist()
        if run:
            losses = dict(zip(losses, values, strict=True))
            run.write(it, losses, {"log", "grid", "save"} if stop else due)
        if stop:
            break

    if run and run.logged_it < args.iters:
        print(f"stopped and saved at iteration {run.logged_it}; add --resume to continue")
    elif run:
        print(f"done: samples and progress.gif are in {args.out}, the weights in last.pt there")
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def catch_signals():
    """-> a list, empty until Ctrl-C, `kill` or a closed terminal asks the run to save and end."""
    signals = []

    def catch(number, frame):
        signals.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(number, signal.SIG_DFL)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does with SIGHUP
            signal.signal(number, catch)
    return signals


# ------------------------------------------------------------------------------ the run's folder
class Run:
    """What the first process writes into the run's folder. Nothing here changes the training."""

    def __init__(self, args, state, images, checkpoint):
        self.args = args
        self.state = state
        self.out = Path(args.out)
        self.log = checkpoint["log"]
        self.logged_it = checkpoint["iter"]
        self.columns = min(9, 2048 // args.img_size)  # a grid is about 2,000 px wide at most

        # the same noise for all grids, for FID, and for the average's batch norm
        rng = torch.Generator().manual_seed(args.seed)
        z = torch.randn(max(2048, args.fid_samples), args.z_dim, generator=rng)
        self.z = z.to(args.device)
        if args.fid_every:
            self.inception = fid.load_inception(args.fid_weights, args.device)
            self.real_stats = fid.measure(fid.list_images(images.filename), self.inception)

        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        device_name = torch.cuda.get_device_name() if self.z.is_cuda else platform.machine()
        head = {**vars(args), "python": platform.python_version(), "device_name": device_name}
        head |= {module.__name__: module.__version__ for module in (torch, torchvision)}
        rows = [json.dumps(row) + "\n" for row in self.log]  # without those after the checkpoint
        with data.atomic_write(self.out / "args.json") as beside:
            beside.write_text(json.dumps(head, indent=1))
        with data.atomic_write(self.out / "log.jsonl") as beside:
            beside.write_text("".join(rows))
        real = data.evenly_spaced(images, self.columns**2)
        data.save_grid(real, self.out / "real.png", self.columns)
        print(f"training on {device_name} in {args.precision}; Ctrl-C saves and ends", flush=True)
        self.clock = time.perf_counter()

    def write(self, it, losses, due):
        """Write what is due: any of "log", "grid", "save" and "fid"."""
        sec = time.perf_counter() - self.clock
        G = self.state["G_ema"]
        if self.args.ema and due != {"log"}:
            # the statistics of averaged weights are not the average of their statistics
            update_bn(self.z[:2048].split(32), G)
        try:
            if "grid" in due:
                images = generate(G, self.z[: self.columns**2])
                data.save_grid(images, self.out / "samples" / f"{it:06d}.png", self.columns)
            if due & {"log", "fid"}:
                self.write_row(it, losses, sec, "fid" in due)
        except OSError:  # of a network drive, say
            self.write(it, losses, {"save"})
            raise
        if due & {"save", "fid"}:
            self.save(it, "last.pt")
        if it == self.args.iters:
            data.save_animation(self.out / "samples", self.out / "progress.gif")

    def write_row(self, it, losses, sec, measure_fid):
        """Add a row to the log and print it. Its time excludes FID and the grid."""
        before = self.log[-1]["sec"] if self.log else 0.0
        images = (it - self.logged_it) * self.args.d_steps * self.args.batch_size
        row = {"iter": it, **losses, "sec": before + sec, "img_per_sec": images / sec}
        best = min((old["fid"] for old in self.log if "fid" in old), default=math.inf)
        self.log.append(row)
        if measure_fid:
            stats = fid.FeatureStats()
            for z in self.z[: self.args.fid_samples].split(64):
                stats.update(self.inception(generate(self.state["G_ema"], z)))
            row["fid"] = fid.frechet_distance(stats.mean, stats.cov, *self.real_stats)
            if row["fid"] < best:
                self.save(it, "best.pt")
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)
        self.logged_it = it
        self.clock = time.perf_counter()

    def save(self, it, name):
        """Write a checkpoint, from which the run can be continued and images can be made."""
        checkpoint = {"script": SCRIPT, "iter": it, "args": vars(self.args), "log": self.log}
        for key, part in self.state.items():
            checkpoint[key] = part.state_dict()
        with data.atomic_write(self.out / name) as beside:
            torch.save(checkpoint, beside)


def load_checkpoint(path):
    """-> what `Run.save` wrote, without executing code in it. Raises ValueError for other files."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except Exception as error:  # torch raises a different one for each kind of damage
        raise ValueError(f"{path} cannot be loaded as a checkpoint: {error!r:.99}") from error
    if script != SCRIPT:
        raise ValueError(f"{path} is a checkpoint of {script}.py")
    return checkpoint


def restore(state, checkpoint, args):
    """Load a checkpoint into the state, except --lr and --betas, which come from args."""
    try:
        for name, part in state.items():  # G last of the generators, for G_ema may be G itself
            part.load_state_dict(checkpoint[name])
    except RuntimeError as error:  # weights of another shape
        advice = "leave out the flags that shape them"
        raise ValueError(f"the run in {args.out} has other networks: {advice}") from error
    for name in ("opt_G", "opt_D"):
        state[name].param_groups[0].update(lr=args.lr, betas=args.betas)


# -------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def generate(G, z):
    """Noise (N, z_dim) -> uint8 images (N, 3, S, S), in evaluation mode and without autocast."""
    training = G.training
    G.eval()
    images = [((G(part) + 1) * 127.5).round().byte() for part in z.split(32)]
    G.train(training)
    return torch.cat(images)


def sample(args):
    """Write images of the generator in args.sample to args.out: one grid, or a folder of PNGs."""
    checkpoint = load_checkpoint(args.sample)
    flags = checkpoint["args"]
    G = Generator(flags["img_size"], flags["z_dim"], flags["max_channels"])
    G.load_state_dict(checkpoint["G_ema"])
    G.to(args.device, memory_format=torch.channels_last)

    rng = torch.Generator().manual_seed(args.seed)
    z = torch.randn(args.num_samples, flags["z_dim"], generator=rng)
    columns = math.ceil(args.num_samples**0.5)
    if args.interpolate:
        # rotate one noise by 90 degrees to another: every point between is standard normal too
        columns = 8
        rows = math.ceil(args.num_samples / columns)
        start, goal = torch.randn(2, rows, 1, flags["z_dim"], generator=rng)
        angle = torch.linspace(0, math.pi / 2, columns)[:, None]
        z = (angle.cos() * start + angle.sin() * goal).flatten(0, 1)[: args.num_samples]

    out = Path(args.out or f"{args.sample}-seed{args.seed}.png")
    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        data.save_grid(generate(G, z.to(args.device)), out, columns)
    else:
        out.mkdir(parents=True)
        for i, part in enumerate(z.split(32)):
            for j, image in enumerate(generate(G, part.to(args.device)), 32 * i):
                data.save_grid(image, out / f"{j:05d}.png", columns=1)
    print(f"{len(z)} images in {out}")


# ------------------------------------------------------------------------------ the command line
def parse_args(parser):
    """-> the flags, and the checkpoint from which to train."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    flag = parser.add_argument
    flag("--data", default="synthetic", help=data.SOURCES)
    flag("--img-size", type=int, default=128, help="a power of two from 16 to 1024")
    flag("--flip", action="store_true", help="flip each image with a probability of one half")
    flag("--cache-dir", default=data.CACHE_DIR, help="folder for prepared images")
    flag("--metric", choices=["l1", "l2"], default="l1", help="distance d of two images")
    flag("--lam", type=float, default=10.0, help="lambda")
    flag("--power", type=int, choices=[2, 4, 6], default=2, help="power of delta")
    flag("--pairwise", action="store_true", help="score pairs of a real and a generated image")
    flag("--iters", type=int, default=100000, help="generator updates")
    flag("--d-steps", type=int, default=2, help="discriminator updates for each generator update")
    flag("--batch-size", type=int, help="over all processes (64, from 512 px on 32)")
    flag("--lr", type=float, default=2e-4, help="learning rate of Adam")
    flag("--betas", type=float, nargs=2, default=[0.5, 0.999], help="betas of Adam")
    flag("--z-dim", type=int, default=128, help="dimensions of the noise")
    flag("--max-channels", type=int, default=2048, help="upper limit on the channels of a layer")
    flag("--ema", type=float, default=0.0, help="decay of an averaged generator (0: off)")
    flag("--seed", type=int, default=0, help="random seed")
    flag("--device", choices=devices, default=devices[0], help="where to run")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on CUDA")
    flag("--out", help="folder of the run (runs/SCRIPT-SIZE); with --sample a picture or a folder")
    flag("--resume", action="store_true", help="continue the run in --out with its flags, or start")
    flag("--log-every", type=int, default=50, help="iterations between rows of the log")
    flag("--sample-every", type=int, default=500, help="iterations between grids")
    flag("--save-every", type=int, default=1000, help="iterations between saves")
    flag("--fid-every", type=int, default=0, help="iterations between FIDs (0: off)")
    flag("--fid-samples", type=int, default=10000, help="generated images for each FID")
    flag("--fid-weights", help="file of Inception weights (default: download them)")
    flag("--sample", metavar="CKPT", help="do not train, but write images from this checkpoint")
    flag("--num-samples", type=int, default=64, help="how many images")
    flag("--interpolate", action="store_true", help="rows from one noise to another")
    args = parser.parse_args()

    checkpoint = {"iter": 0, "log": []}  # of a new run
    if args.sample is None:
        args.out = args.out or f"runs/{SCRIPT}-{args.img_size}"
        last = Path(args.out, "last.pt")
        if last.exists() and not args.resume:
            raise ValueError(f"{args.out} holds a run: add --resume, or name another --out")
        if last.exists():
            checkpoint = load_checkpoint(last)
            flags = {name: old for name, old in checkpoint["args"].items() if name in args}
            parser.set_defaults(**{**flags, "out": args.out})
            args = parser.parse_args()  # what is typed wins
    if args.batch_size is None:
        args.batch_size = 64 if args.img_size < 512 else 32
    if args.precision == "auto":
        args.precision = "bf16" if args.device == "cuda" else "fp32"

    for name, value in vars(args).items():
        may_be_zero = name in ("seed", "ema", "fid_every")
        if type(value) in (int, float) and not (value > 0 or may_be_zero and value == 0):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")
    if args.ema >= 1 or args.batch_size < 2 * WORLD:
        raise ValueError("--ema must be below 1, and --batch-size 2 or more for each process")
    return args, checkpoint


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be valid text
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]    (-h lists them)",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    try:
        args, checkpoint = parse_args(parser)
        if args.sample is not None:
            sample(args)
        else:
            train(args, checkpoint)
    except torch.OutOfMemoryError:
        parser.error("out of GPU memory: lower --batch-size, --max-channels or --num-samples")
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
