"""SGAN-SN in one file: the original GAN, with spectral normalisation of its discriminator.

    discriminator   max over T of   E[ log sigmoid(T(x_r)) ] + E[ log(1 - sigmoid(T(x_f))) ]
    generator       min over G of   E[ -log sigmoid(T(x_f)) ]

Here x_r is a real image, x_f a generated one, and T the discriminator's score before the sigmoid.

    python sgan_sn.py --img-size 128 --data photos/            train on a folder or a .zip
    python sgan_sn.py --img-size 128 --data photos/ --resume   continue after Ctrl-C or a crash
    python sgan_sn.py --sample runs/sgan_sn-128/last.pt --out grid.png
    torchrun --nproc-per-node 8 sgan_sn.py --img-size 512 --data photos/

Without --data it trains on cartoon faces, which the program draws itself.

Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv 1802.05957.
"""

import argparse
import contextlib
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
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached
from torch.optim.swa_utils import update_bn

import data
import fid

SCRIPT = Path(__file__).stem
IMG_SIZES = [16, 32, 64, 128, 256, 512, 1024]
MIN_DISTANCE = 1e-4  # a hundredth of a grey level: two equal images must not divide by zero
NORM = {"eps": 1e-3, "momentum": 0.01}  # batch norm as in Keras, which writes it as momentum 0.99
NORM_SAMPLES = 2048  # generated images from which the average's batch norm takes its statistics


# ------------------------------------------------------------------------------- networks


def layer_widths(img_size, max_channels=None):
    """Channels of the hidden layers, from narrow to wide: [64, 128, 256, 512, 1024] at 128 px.

    There are log2(img_size) - 2 of them, each twice as wide as the one before. The widest has
    8 * img_size channels, but at most `max_channels` (2048 by default).
    Raises ValueError for a size that is not one of IMG_SIZES, and for too few channels.
    """
    if img_size not in IMG_SIZES:
        raise ValueError(f"img_size must be one of {IMG_SIZES}, not {img_size}")
    halvings = int(math.log2(img_size)) - 3
    widest = min(8 * img_size, max_channels or 2048)
    if widest < 2**halvings:
        raise ValueError(f"max_channels must be at least {2**halvings} at {img_size} px")
    return [widest // 2**i for i in range(halvings, -1, -1)]


def glorot_init(module):
    """Glorot uniform weights and zero biases: the defaults of Keras, used in the paper."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """Standard normal noise (B, z_dim) -> images (B, 3, img_size, img_size) in [-1, 1]."""

    def __init__(self, img_size, z_dim=128, max_channels=None):
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
        if x.device.type == "mps":
            x = x.contiguous()  # see memory_format
        return torch.tanh(self.layers(x).to(z.dtype))


class Discriminator(nn.Module):
    """Images (B, 3, img_size, img_size) in [-1, 1] -> raw scores (B,).

    With sn=True all layers are spectrally normalised and have biases; with sn=False they have batch
    norm instead. Without biases and batch norm, T(a x) = a T(x): a faint image would score near 0
    whatever it shows.
    """

    def __init__(self, img_size, max_channels=None, sn=True):
        super().__init__()
        widths = layer_widths(img_size, max_channels)

        layers = [
            nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=sn),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for narrow, wide in itertools.pairwise(widths):
            layers.append(nn.Conv2d(narrow, wide, 5, stride=2, padding=2, bias=sn))
            if not sn:
                layers.append(nn.BatchNorm2d(wide, **NORM))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(16 * widths[-1], 1, bias=sn)
        self.apply(glorot_init)
        if sn:
            for layer in [*self.layers[::2], self.linear]:
                spectral_norm(layer)

    def forward(self, x):
        features = self.layers(x).permute(0, 2, 3, 1).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # scores are subtracted: full precision
            return self.linear(features.to(x.dtype)).squeeze(1)


# -------------------------------------------------------------------------- the divergence


def check_same_shape(what, a, b):
    """Raise ValueError for two shapes: broadcasting would silently pair the wrong elements."""
    if a.shape != b.shape:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"{what} must have the same shape, not {shapes}")


def pair_distance(x_real, x_fake, metric="l1"):
    """Distance of the two images of each pair: (B, ...), (B, ...) -> (B,).

    metric: "l1", the mean absolute difference, or "l2", the root of the mean square.
    Raises ValueError for shapes that differ and for another metric.
    """
    check_same_shape("real and generated images", x_real, x_fake)
    difference = (x_real - x_fake).flatten(1)
    if metric == "l1":
        return difference.abs().mean(1)
    if metric == "l2":
        return difference.square().mean(1).sqrt()
    raise ValueError(f"metric must be l1 or l2, not {metric}")


def lipschitz_ratio(delta, distance):
    """Mean of |delta| / d, logged as `lipschitz`: (B,), (B,) -> scalar."""
    check_same_shape("delta and distance", delta, distance)
    return (delta.abs() / distance.clamp_min(MIN_DISTANCE)).mean()


def js_divergence(score_real, score_fake):
    """Estimate of the Jensen-Shannon divergence from scores: (B,), (B,) -> scalar, at most log 2.

    1/2 E[log sigmoid(T(x_r))] + 1/2 E[log(1 - sigmoid(T(x_f)))] + log 2
    """
    check_same_shape("scores", score_real, score_fake)
    loss = F.softplus(-score_real).mean() + F.softplus(score_fake).mean()
    return math.log(2) - loss / 2


def discriminator_loss(D, x_real, x_fake, args):
    """-> loss to minimise, estimate of the divergence, mean of |delta| / d: three scalars."""
    with cached():  # one spectral norm for both passes
        score_real = D(x_real)
        score_fake = D(x_fake)
    divergence = js_divergence(score_real, score_fake)
    loss = 2 * (math.log(2) - divergence)  # -E[log sigmoid(T(x_r))] - E[log(1 - sigmoid(T(x_f)))]
    delta = score_real - score_fake
    return loss, divergence, lipschitz_ratio(delta, pair_distance(x_real, x_fake))


def generator_loss(D, x_real, x_fake, args):
    """-> loss to minimise: E[-log sigmoid(T(x_f))], which does not saturate while T is right."""
    return F.softplus(-D(x_fake)).mean()


# -------------------------------------------------------------------------------- training


def train_iteration(it, state, batches, rng, args, amp):
    """Iteration `it` (from 1): args.d_steps discriminator updates, then one generator update.

    state: networks and optimizers, as `build` makes them; batches: a data.Batches; rng: a
    torch.Generator on the device; amp: the autocast context for networks and losses.
    Returns the last losses by name, as scalar tensors, and does not wait for them, so that a GPU
    never idles (of several processes, SyncBatchNorm does wait). All randomness follows from the
    seed and `it`: there is no random state to save.
    """
    G = state["G"]
    D = state["D"]
    first_batch = (it - 1) * (args.d_steps + 1)
    rng.manual_seed(int(np.random.SeedSequence((args.seed, it)).generate_state(1)[0]))

    # discriminator: tell real from generated images
    for step in range(args.d_steps):
        x_real = batches[first_batch + step]
        with amp:
            with torch.no_grad():
                x_fake = G(draw_noise(rng, args))
            d_loss, divergence, lipschitz = discriminator_loss(D, x_real, x_fake, args)
        update(state["opt_D"], d_loss, args.world)

    # generator: make images that score like real ones
    D.requires_grad_(False)  # its gradients would be computed for nothing
    x_real = batches[first_batch + args.d_steps]
    with amp:
        g_loss = generator_loss(D, x_real, G(draw_noise(rng, args)), args)
    update(state["opt_G"], g_loss, args.world)
    D.requires_grad_(True)

    if args.ema:
        update_average(state["G_ema"], G, args.ema, it)
    losses = {"d_loss": d_loss, "g_loss": g_loss, "divergence": divergence, "lipschitz": lipschitz}
    return {name: loss.detach() for name, loss in losses.items()}


def draw_noise(rng, args):
    """This process's part of a batch of standard normal noise: (batch_size / world, z_dim)."""
    z = torch.randn(args.batch_size, args.z_dim, generator=rng, device=rng.device)
    return z.chunk(args.world)[args.rank]


def update(optimizer, loss, world=1):
    """One step of `optimizer` down the gradient of `loss`, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    if world > 1:
        # not DistributedDataParallel, which does not see the gradient within a gradient penalty
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad /= world
            torch.distributed.all_reduce(parameter.grad)
    optimizer.step()


@torch.no_grad()
def update_average(G_ema, G, decay, it):
    """Make G_ema the exponential moving average of G's weights after iterations 1 to `it`.

    As in Adam, the average is corrected for its start: the initial weights have no share in it.
    """
    share = (1 - decay) / (1 - decay**it)
    for average, weight in zip(G_ema.parameters(), G.parameters(), strict=True):
        average.lerp_(weight, share)


def build(args, device):
    """-> the state of a new run: both networks, their optimizers, and the averaged generator.

    Without --ema, G_ema is G itself. Raises ValueError for sizes that the networks cannot have.
    """
    torch.manual_seed(args.seed)
    G = Generator(args.img_size, args.z_dim, args.max_channels)
    D = Discriminator(args.img_size, args.max_channels, sn=not args.no_sn)
    G_ema = copy.deepcopy(G) if args.ema else G
    if args.world > 1 and device.type == "cuda":  # G_ema stays: the first process runs it alone
        G = nn.SyncBatchNorm.convert_sync_batchnorm(G)
        D = nn.SyncBatchNorm.convert_sync_batchnorm(D)
    for network in (G, D, G_ema):
        network.to(device, memory_format=memory_format(device))

    fused = device.type != "mps"
    adam = {"lr": args.lr, "betas": args.betas, "eps": 1e-7, "fused": fused}  # Keras' epsilon
    opt_G = torch.optim.Adam(G.parameters(), **adam)
    opt_D = torch.optim.Adam(D.parameters(), **adam)
    return {"G": G, "D": D, "G_ema": G_ema, "opt_G": opt_G, "opt_D": opt_D}


def set_up(args, device):
    """-> what the loop in `train` needs: state, batches, the iterations done so far, and a Run.

    Only the first process has a Run. Ends with one line where the flags, the images and the run
    that --resume continues do not go together.
    """
    check_folder(args)
    try:
        state = build(args, device)
        done, log, old_images = restore(args, state)
        check_agreement(done, args)
        images = data.load_images(args.data, args.img_size, args.cache_dir, quiet=args.rank > 0)
        if old_images and old_images != data.fingerprint(images):
            fail(f"{args.data} does not hold the images of the run in {args.out}")
        batches = data.Batches(
            images, args.batch_size, device, args.seed, args.flip, args.rank, args.world
        )
        run = Run(args, state, images, done, log) if args.rank == 0 else None
    except ValueError as error:
        fail(error)
    return state, batches, done, run


def train(args):
    """Train until args.iters, or until the run is asked to stop. Its results are in args.out."""
    device = torch.device(args.device)
    if device.type == "cpu" and args.img_size >= 128 and args.rank == 0:
        hint = "a size for a CPU is --img-size 32 --max-channels 128"
        print(f"training on the CPU: an iteration can take many seconds; {hint}", flush=True)
    join_processes(args.world, device)
    state, batches, done, run = set_up(args, device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    rng = torch.Generator(device)
    stop = StopRequest()
    if run:
        run.write_head()

    it = done
    for it in range(done + 1, args.iters + 1):
        losses = train_iteration(it, state, batches, rng, args, amp)

        first = it == done + 1
        last = it == args.iters
        stop_now = stop.agreed(args.world)
        fid_now = args.fid_every > 0 and not stop_now and (last or it % args.fid_every == 0)
        sample_now = last or it % args.sample_every == 0
        save_now = first or last or stop_now or fid_now or it % args.save_every == 0
        log_now = first or last or stop_now or fid_now or it % args.log_every == 0

        # nothing above waits for the GPU (SyncBatchNorm aside), everything below does
        if log_now or save_now or sample_now:
            losses = read_losses(losses, it, state, args)
        if run:
            if fid_now:
                run.save(it, "last.pt")  # FID takes minutes, and whoever stops a run may not wait
            if log_now:
                run.log_row(it, losses, fid_now)
            if save_now:
                run.save(it, "last.pt")
            if sample_now:
                run.save_samples(it)
        if stop_now:
            break

    if run:
        run.finish(it)
    if args.world > 1:
        stop.agreed(args.world)  # the first process may still be busy: end together
        torch.distributed.destroy_process_group()


def read_losses(losses, it, state, args):
    """Scalar tensors -> floats, averaged over the processes. Ends the run if one is not finite."""
    values = torch.stack(list(losses.values()))
    if args.world > 1:
        torch.distributed.all_reduce(values)
        values /= args.world
    finite = [tensor.isfinite().all() for tensor in (values, *state["G"].parameters())]
    if not torch.stack(finite).all():
        hint = f"try a lower --lr (last.pt in {args.out} was saved before)"
        fail(f"iteration {it}: the loss or the generator is not finite; {hint}")
    return dict(zip(losses, values.tolist(), strict=True))


# ------------------------------------------------------------------------- the run's folder


class Run:
    """What a run writes into its folder: log, sample grids, FID and checkpoints.

    It only watches: nothing here changes the training. Only the first process has one.
    """

    def __init__(self, args, state, images, done, log):
        """Raises ValueError if FID is on and the Inception weights cannot be obtained."""
        self.args = args
        self.state = state
        self.images = images
        self.log = log
        self.out = Path(args.out)
        self.columns = min(9, 2048 // args.img_size)  # a grid is about 2,000 px wide at most
        self.refreshed_at = None  # the iteration for which G_ema's batch norm is up to date

        # the same noise for all sample grids and for FID
        rng = torch.Generator().manual_seed(args.seed)
        z = torch.randn(max(NORM_SAMPLES, args.fid_samples), args.z_dim, generator=rng)
        self.fixed_z = z.to(args.device)
        if args.fid_every:
            self.inception = fid.load_inception(args.fid_weights, args.device)
            self.real_stats = fid.array_stats(images, self.inception)

        self.logged_it = done
        self.logged_sec = log[-1]["sec"] if log else 0.0
        self.began = time.perf_counter() - self.logged_sec  # as if the run had never paused

    def write_head(self):
        """Write what is known before the first iteration, and say what is going to be trained."""
        hardware = platform.machine()
        if self.fixed_z.is_cuda:
            hardware = torch.cuda.get_device_name(self.fixed_z.device)
        head = {
            **vars(self.args),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "device_name": hardware,
        }
        with data.atomic_write(self.out / "args.json") as file:
            file.write(json.dumps(head, indent=1).encode())
        with data.atomic_write(self.out / "log.jsonl") as file:  # without rows after the checkpoint
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.log)
        (self.out / "samples").mkdir(exist_ok=True)
        real = data.evenly_spaced(self.images, self.columns**2)
        data.save_grid(real, self.out / "real.png", self.columns)

        size_G = sum(p.numel() for p in self.state["G"].parameters())
        size_D = sum(p.numel() for p in self.state["D"].parameters())
        self.say(
            f"{SCRIPT}: {len(self.images):,} images, {size_G:,} parameters in G, {size_D:,} in D, "
            f"{self.args.precision} on {self.args.device} ({hardware})"
        )

    def say(self, line):
        """Print a line. If that fails, act as if somebody had stopped the run: save and end."""
        try:
            print(line, flush=True)
        except OSError:  # the terminal or the pipe is closed, or a disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.raise_signal(signal.SIGTERM)

    def log_row(self, it, losses, fid_now):
        """Add a row to the log and print it; with fid_now, measure FID and keep the best state."""
        sec = time.perf_counter() - self.began
        sec_per_it = (sec - self.logged_sec) / (it - self.logged_it)
        row = {"iter": it, **losses, "sec": round(sec, 3)}
        row["img_per_sec"] = round(self.args.d_steps * self.args.batch_size / sec_per_it, 1)
        best = False
        if fid_now:
            row["fid"] = self.measure_fid(it)
            best = all(row["fid"] < old.get("fid", math.inf) for old in self.log)
        self.logged_it = it
        self.logged_sec = time.perf_counter() - self.began  # the next row's speed is without FID

        self.log.append(row)
        if best:
            self.save(it, "best.pt")
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = "  ".join(f"{name} {value:.6g}" for name, value in row.items())
        left = timedelta(seconds=round((self.args.iters - it) * sec_per_it))
        self.say(f"{numbers}  left {left}")

    def refresh_average(self, it):
        """Bring the batch norm of G_ema up to date, by measuring it on generated images.

        The statistics of averaged weights are not the average of their statistics.
        """
        if self.args.ema and self.refreshed_at != it:
            update_bn(self.fixed_z[:NORM_SAMPLES].split(32), self.state["G_ema"])
            self.refreshed_at = it

    def measure_fid(self, it):
        """FID between all training images and as many generated ones as --fid-samples says."""
        self.refresh_average(it)
        noise = self.fixed_z[: self.args.fid_samples].split(64)
        generated = (generate(self.state["G_ema"], z) for z in noise)
        stats = fid.generated_stats(generated, self.inception)
        return fid.frechet_distance(*stats, *self.real_stats)

    def save_samples(self, it):
        """Write the grid of images that the generator makes of noise that never changes."""
        self.refresh_average(it)
        images = generate(self.state["G_ema"], self.fixed_z[: self.columns**2])
        data.save_grid(images, self.out / "samples" / f"{it:06d}.png", self.columns)

    def save(self, it, name):
        """Write a checkpoint, from which the run can be continued and images can be made."""
        self.refresh_average(it)
        checkpoint = {
            "script": SCRIPT,
            "iter": it,
            "args": vars(self.args),
            "images": data.fingerprint(self.images),
            "log": self.log,
        }
        for key, part in self.state.items():
            checkpoint[key] = part.state_dict()
        with data.atomic_write(self.out / name) as file:
            torch.save(checkpoint, file)

    def finish(self, it):
        """Say how the run ended; if it reached its last iteration, make the animation."""
        if it < self.args.iters:
            self.say(f"stopped and saved at iteration {it}; add --resume to continue")
            return
        data.save_animation(self.out / "samples", self.out / "progress.gif")
        self.say(f"done: samples and progress.gif are in {self.out}, the weights in last.pt there")


def check_folder(args):
    """Refuse a folder in which this run would overwrite another one."""
    out = Path(args.out)
    if (out / "last.pt").exists():
        if not args.resume:
            fail(f"--out {out} holds a run: add --resume to continue it, or name another folder")
    elif any(any(out.glob(kind)) for kind in ("*.pt", "*.gif", "samples/*")):
        fail(f"--out {out} holds a run without last.pt: name another folder")
    elif args.resume and args.rank == 0:
        print(f"there is no {out / 'last.pt'} yet: starting at iteration 1", flush=True)


def restore(args, state):
    """With --resume, load what last.pt holds into `state`.

    -> (its iteration, its log, the fingerprint of its images); for a new run (0, [], None).
    """
    path = Path(args.out) / "last.pt"
    if not path.exists():
        return 0, [], None
    with refusing_damage(path):
        checkpoint = load_checkpoint(path)
        old_args = checkpoint["args"]
        for name, old in old_args.items():
            new = vars(args).get(name)
            if new != old and name not in MAY_CHANGE:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} {new} does not match the run in {args.out}, which has {flag} {old}")
        if checkpoint["iter"] > args.iters:
            fail(f"the run in {args.out} is at iteration {checkpoint['iter']}: raise --iters")
        if (args.device == "mps") != (old_args["device"] == "mps"):
            fail("a run can move neither to mps nor away from it: Adam's state differs there")
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["iter"], checkpoint["log"], checkpoint["images"]


def load_checkpoint(path):
    """-> the dict that `Run.save` has written. Never executes code from the file."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["script"] != SCRIPT:
        raise ValueError(f"it belongs to {checkpoint['script']}.py")
    return checkpoint


@contextlib.contextmanager
def refusing_damage(path):
    """End with one line if anything goes wrong while the checkpoint `path` is read."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0]  # torch has a line for each wrong parameter
        kind = type(error).__name__
        fail(f"{path} is not a valid checkpoint of {SCRIPT}.py ({kind}: {reason})")


# -------------------------------------------------------------------- devices and processes


def fail(message, everywhere=True):
    """End with one line on standard error and exit code 2.

    If every process fails for the same reason (everywhere), only the first one of each machine
    reports it; otherwise each process that fails does.
    """
    rank = os.environ.get("RANK") or "0"
    who = f"{SCRIPT}.py" if rank == "0" else f"{SCRIPT}.py, process {rank}"
    if not everywhere or "0" in (rank, os.environ.get("LOCAL_RANK")):
        print(f"{who}: {message}", file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error):
    """Whether an exception means that a device, or the machine, has too little memory."""
    # words in the messages of NumPy, the CPU, CUDA, NCCL, MPS, and cuDNN (the last two)
    words = ("alloc", "ALLOC", "out of memory", "find an engine", "execution plans")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def read_processes():
    """-> the number of this process and how many there are, as torchrun says: (0, 1) without it."""
    rank = os.environ.get("RANK") or "0"
    world = os.environ.get("WORLD_SIZE") or "1"
    if (rank, world) == ("0", "1"):
        return 0, 1
    valid = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
    if not (valid and os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        hint = "start several processes with torchrun, or unset both"
        fail(f"RANK or WORLD_SIZE is set, but not as torchrun sets them: {hint}", everywhere=False)
    return int(rank), int(world)


def check_agreement(done, args):
    """Refuse processes that would continue from different checkpoints."""
    if args.world > 1:
        bounds = torch.tensor([done, -done])
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)  # max and -min
        if bounds[0] != -bounds[1]:
            fail(f"--out {args.out} differs between machines: it must be a folder they share")


def check_device(args):
    """Refuse a device that is not there; of several GPUs, give each process its own."""
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if args.device == "cuda" and 0 < gpus < processes:
        fail(f"{processes} processes, but only {gpus} GPU(s): lower torchrun's --nproc-per-node")
    if args.device.startswith("cuda:") and args.world > 1:
        fail(f"--device {args.device} cannot serve several processes: give --device cuda")
    try:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        elif args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)
        torch.zeros(1, device=args.device)
    except Exception as error:
        reason = str(error).split("\n")[0]
        hint = f"is not available ({reason}); try --device cpu"
        fail(f"--device {args.device} {hint}", everywhere=False)


def choose_precision(device):
    """-> "bf16" where the device has bf16 arithmetic, else "fp32"."""
    bf16 = False
    if device.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        bf16 = torch.cpu._is_avx512_bf16_supported()  # torch 2.6 has nothing public that tells
    return "bf16" if bf16 else "fp32"


def configure_cuda():
    """All images are the same size, so cuDNN may time its algorithms. fp32 means fp32, not TF32."""
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers change the default
    cudnn = torch.backends.cudnn
    cudnn.benchmark = True
    if hasattr(cudnn, "conv"):  # since torch 2.9, which warns about the older switch for TF32
        cudnn.conv.fp32_precision = "ieee"
    else:
        cudnn.allow_tf32 = False


def memory_format(device):
    """Channels last is the fast layout, but on Apple's MPS batch norm needs contiguous tensors.

    Its backward pass is wrong or fails with channels last (PyTorch issues 134580 and 175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def join_processes(world, device):
    """Join the other processes that torchrun has started, if there are any."""
    if world == 1:
        return
    # Adam's first step imports this. If that happened only after the process group is made, the
    # processes would hang at their end.
    import torch.distributed.nn

    # After a restart torchrun's store still holds the old addresses, hence a prefix of its own.
    waiting = timedelta(hours=1)  # while the first process measures FID
    store, rank, _ = next(torch.distributed.rendezvous("env://", timeout=waiting))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"after {restarts} restarts", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=waiting
    )


class StopRequest:
    """Remembers that somebody asked the run to stop: Ctrl-C, `kill`, or a closed terminal."""

    def __init__(self):
        self.asked = False
        # On the CPU, so that nobody waits for a GPU. One tensor for the whole run: Gloo's thread
        # would need the GIL to free a vote's own tensor, but destroy_process_group holds the GIL
        # while it waits for that thread.
        self.votes = torch.zeros(1)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU", "SIGBREAK"):
            number = getattr(signal, name, None)  # not every system has them all
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
                signal.signal(number, self.ask)

    def ask(self, *_):
        if not self.asked and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError, RuntimeError):  # closed, or in the midst of a print
                print("stopping after this iteration", file=sys.stderr)
        self.asked = True

    def agreed(self, world):
        """Whether any process was asked. They must stop together, or one would wait forever."""
        if world == 1:
            return self.asked
        self.votes.fill_(self.asked)
        torch.distributed.all_reduce(self.votes)
        return self.votes.item() > 0


# -------------------------------------------------------------------------------- sampling


@torch.no_grad()
def generate(G, z):
    """Noise (N, z_dim) -> uint8 images (N, S, S, 3), in evaluation mode and without autocast."""
    G.eval()
    images = [((G(part) + 1) * 127.5).round().byte() for part in z.split(32)]
    G.train()
    return torch.cat(images).permute(0, 2, 3, 1)


def sample(args):
    """Write images of the generator in args.sample to args.out: one grid, or a folder of PNGs."""
    out = Path(args.out)
    as_grid = data.is_picture_name(out)
    if out.exists() and (as_grid or not out.is_dir() or any(out.glob("*.png"))):
        fail(f"--out {out} exists: name a new file or folder")
    with refusing_damage(args.sample):
        checkpoint = load_checkpoint(args.sample)
        flags = checkpoint["args"]
        G = Generator(flags["img_size"], flags["z_dim"], flags["max_channels"])
        G.load_state_dict(checkpoint["G_ema"])
    device = torch.device(args.device)
    G.to(device, memory_format=memory_format(device))
    (out.parent if as_grid else out).mkdir(parents=True, exist_ok=True)

    rng = torch.Generator().manual_seed(args.seed)
    z = torch.randn(args.num_samples, flags["z_dim"], generator=rng)
    if args.interpolate:
        # rotate each noise by 90 degrees to another: every point between is standard normal too
        goal = torch.randn(args.num_samples, flags["z_dim"], generator=rng)
        angle = torch.linspace(0, math.pi / 2, 8)[:, None]
        z = angle.cos() * z[:, None] + angle.sin() * goal[:, None]
        z = z.flatten(0, 1)[: args.num_samples]

    if as_grid:
        columns = 8 if args.interpolate else math.ceil(len(z) ** 0.5)
        data.save_grid(generate(G, z.to(device)), out, columns)
    else:
        for i, part in enumerate(z.split(32)):
            for j, image in enumerate(generate(G, part.to(device)), 32 * i):
                data.save_grid(image[None], out / f"{j:05d}.png", columns=1)
    print(f"{len(z)} images in {out}")


# ------------------------------------------------------------------------- the command line

# What may differ when a run is resumed. All other flags must match the checkpoint.
MAY_CHANGE = {
    "data", "cache_dir", "iters", "device", "precision", "out", "resume", "log_every",
    "sample_every", "save_every", "fid_every", "fid_weights", "sample", "num_samples",
    "interpolate", "rank", "world",
}


def bounded(kind, low, high):
    """A type for argparse: an int or a float from `low` to `high`."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    convert.__name__ = kind.__name__  # which argparse shows for text that is no number
    return convert


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail  # one line, without the usage
    flag = parser.add_argument
    count = bounded(int, 1, 10**9)

    # images
    flag("--data", default="synthetic",
         help="folder, .zip, torchvision:NAME, synthetic or synthetic:N (%(default)s)")
    flag("--img-size", type=int, choices=IMG_SIZES, default=128, help="in pixels (%(default)s)")
    flag("--flip", action="store_true", help="flip each image with a probability of one half")
    flag("--cache-dir", type=data.typed_path, default=data.CACHE_DIR,
         help="folder for prepared images and statistics (%(default)s)")

    # divergence
    flag("--no-sn", action="store_true",
         help="plain SGAN: batch norm instead of spectral normalisation")

    # training
    flag("--iters", type=count, default=100000, help="generator updates (%(default)s)")
    flag("--d-steps", type=count, default=1,
         help="discriminator updates for each generator update (%(default)s)")
    flag("--batch-size", type=bounded(int, 2, 10**6),
         help="batch size over all processes (64; 32 at 512 px and above)")
    flag("--lr", type=bounded(float, 1e-9, 1), default=2e-4, help="learning rate (%(default)s)")
    flag("--betas", type=bounded(float, 0, 0.99999), nargs=2, default=[0.5, 0.999],
         help="betas of Adam (%(default)s)")
    flag("--z-dim", type=bounded(int, 2, 10**5), default=128, help="size of z (%(default)s)")
    flag("--max-channels", type=bounded(int, 2, 10**5), default=2048,
         help="channels of the widest layer, at most (%(default)s)")
    flag("--ema", type=bounded(float, 0, 0.999999), default=0.0,
         help="decay of an averaged generator, used for samples and FID (0: off)")
    flag("--seed", type=bounded(int, 0, 2**31), default=0, help="random seed (%(default)s)")

    # the run
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         help="cuda, cpu or mps (%(default)s)")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto",
         help="bf16: autocast, with losses in fp32; auto: bf16 where the hardware has it")
    flag("--out", type=data.typed_path, help=f"the run's folder (runs/{SCRIPT}-SIZE); "
         "with --sample a picture such as grid.png, or a folder (CKPT-seedN.png)")
    flag("--resume", action="store_true",
         help="continue from last.pt in --out; if there is none yet, start")
    flag("--log-every", type=count, default=50, help="iterations between rows (%(default)s)")
    flag("--sample-every", type=count, default=500, help="iterations between grids (%(default)s)")
    flag("--save-every", type=count, default=1000, help="iterations between saves (%(default)s)")
    flag("--fid-every", type=bounded(int, 0, 10**9), default=0, help="iterations (0: never)")
    flag("--fid-samples", type=bounded(int, 2, 10**7), default=10000,
         help="generated images for each FID (%(default)s)")
    flag("--fid-weights", type=data.typed_path,
         help="file of Inception weights (the published ones, downloaded once)")

    # sampling
    flag("--sample", type=data.typed_path, metavar="CKPT",
         help="do not train, but write images from this checkpoint to --out")
    flag("--num-samples", type=count, default=64, help="how many images (%(default)s)")
    flag("--interpolate", action="store_true",
         help="rows of 8 images that interpolate between two noise vectors")
    return parser.parse_args()


def main():
    args = parse_args()
    args.rank, args.world = read_processes()
    if args.batch_size is None:
        args.batch_size = 64 if args.img_size < 512 else 32
    fewest = 2 * args.world
    if args.batch_size < fewest:
        fail(f"--batch-size must be at least {fewest}: batch norm needs two images a process")
    if args.out is None and args.sample:
        args.out = f"{args.sample}-seed{args.seed}.png"
    if args.out is None:
        args.out = f"runs/{SCRIPT}-{args.img_size}"
    check_device(args)
    configure_cuda()
    if args.precision == "auto":
        args.precision = choose_precision(args.device)

    try:
        if args.sample and args.world == 1:
            sample(args)
        elif args.sample:
            fail("--sample needs one process only: start it without torchrun")
        elif args.rank > 0:
            train(args)
        else:
            with data.file_lock(Path(args.out) / ".lock", wait=False):
                train(args)
    except BlockingIOError:
        fail(f"--out {args.out} is in use by another run: wait until it ends, or name another")
    except (OSError, KeyboardInterrupt) as error:  # a full disk, say, or Ctrl-C before the loop
        fail(str(error) or "interrupted", everywhere=False)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "try a smaller --batch-size, --max-channels or --img-size, or --precision bf16"
        if args.sample:
            hint = "try a smaller --num-samples"
        reason = str(error).split("\n")[0][:100]
        fail(f"out of memory: {hint} ({reason})", everywhere=False)


if __name__ == "__main__":
    main()
