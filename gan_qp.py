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
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import data
import fid

RANK = int(os.environ.get("RANK", 0))  # which of the WORLD processes this is: set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))


# -------------------------------------------------------------------------------------- networks
def layer_widths(img_size, max_channels=2048):
    """Channels from the image inward: [64, 128, 256, 512, 1024] at 128 px, 8 * img_size at most."""
    if img_size not in (16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"--img-size must be a power of two from 16 to 1024, not {img_size}")
    doublings = int(math.log2(img_size)) - 3
    widest = min(8 * img_size, max_channels)
    if widest < 2**doublings:
        raise ValueError(f"--max-channels must be at least {2**doublings} at {img_size} px")
    return [widest // 2**i for i in range(doublings, -1, -1)]


def glorot_init(module):
    """Glorot uniform weights and zero biases: the defaults of Keras, as in the GAN-QP paper."""
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
        self.norm = nn.BatchNorm1d(16 * widths[0], eps=1e-3)  # as in Keras

        up = {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1}
        layers = []
        for wide, narrow in itertools.pairwise(widths):
            layers.append(nn.ConvTranspose2d(wide, narrow, **up))
            layers.append(nn.BatchNorm2d(narrow, eps=1e-3))
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
            layers.append(nn.BatchNorm2d(wide, eps=1e-3))
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


# --------------------------------------------------------------------------------- one iteration
def train_iteration(x_real, z, G, D, opt_G, opt_D, args):
    """args.d_steps updates of the discriminator, then one of the generator: the whole method.

    x_real: real batches, (B, 3, S, S) in [-1, 1], one for each update of D (with --pairwise one
    more, for G); z: noise, (B, z_dim), one for each update, G's last. Returns the last losses by
    name, as scalar tensors, without waiting for the GPU.
    Of args it reads d_steps, precision, pairwise, metric, lam and power.
    """
    amp = torch.autocast(z[0].device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # discriminator: tell real from generated images
    for step in range(args.d_steps):
        with amp:
            with torch.no_grad():
                x_fake = G(z[step])
            delta = score_difference(D, x_real[step], x_fake, args.pairwise)
            distance = pair_distance(x_real[step], x_fake, args.metric)
            d_loss = -qp_divergence(delta, distance, args.lam, args.power).mean()
        update(opt_D, d_loss)
    lipschitz = (delta.abs() / distance.clamp_min(1e-4)).mean()  # of the last step: for the log

    # generator: make images that score like real ones
    D.requires_grad_(False)  # its gradients would be wasted work
    with amp:
        x_fake = G(z[-1])
        if args.pairwise:
            g_loss = score_difference(D, x_real[-1], x_fake, pairwise=True).mean()
        else:
            g_loss = -D(x_fake).mean()  # D(x_real) does not depend on G
    update(opt_G, g_loss)
    D.requires_grad_(True)

    losses = {"d_loss": d_loss, "g_loss": g_loss, "lipschitz": lipschitz}
    return {name: loss.detach() for name, loss in losses.items()}


def update(optimizer, loss):
    """One step of `optimizer` down the gradient of `loss`, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    if WORLD > 1:
        # not by DistributedDataParallel, which does not support the penalty of wgan_gp.py
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad /= WORLD
            torch.distributed.all_reduce(parameter.grad)
    optimizer.step()


# -------------------------------------------------------------------------------------- training
def train(args, images, checkpoint, inception):
    """Train to args.iters, on images of data.load_images; inception: for FID, or None."""
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # training batches have one shape

    torch.manual_seed(args.seed)
    G = Generator(args.img_size, args.z_dim, args.max_channels)
    D = Discriminator(args.img_size, args.max_channels, args.pairwise)
    G_ema = copy.deepcopy(G).eval()  # without SyncBatchNorm: the first process runs it alone
    if WORLD > 1 and args.device == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(G)
        nn.SyncBatchNorm.convert_sync_batchnorm(D)
    for network in (G, D, G_ema):
        network.to(device, memory_format=torch.channels_last)
    adam = {"lr": args.lr, "betas": args.betas, "eps": 1e-7, "fused": True}  # Keras' epsilon
    opt_G = torch.optim.Adam(G.parameters(), **adam)
    opt_D = torch.optim.Adam(D.parameters(), **adam)
    state = {"G": G, "D": D, "G_ema": G_ema, "opt_G": opt_G, "opt_D": opt_D}

    start, log = checkpoint["iter"], checkpoint["log"]
    if start:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        for optimizer in (opt_G, opt_D):  # what is typed replaces what was saved
            optimizer.param_groups[0].update(lr=args.lr, betas=args.betas)

    n_real = args.d_steps + args.pairwise  # real batches an iteration
    batches = data.Batches(images, args.batch_size, device, args.seed, args.flip, RANK, WORLD)
    batches.ahead = n_real  # read one iteration ahead
    out = Path(args.out)
    rng = torch.Generator().manual_seed(args.seed)  # the same noise for all grids and FIDs
    z_fixed = torch.randn(max(2048, args.fid_samples), args.z_dim, generator=rng).to(device)
    columns = min(9, 2048 // args.img_size)  # a grid is about 2,000 px wide at most
    if RANK == 0:
        start_folder(out, args, log)
        data.save_grid(data.evenly_spaced(images, columns**2), out / "real.png", columns)
        if inception:
            real = fid.measure(fid.list_images(images.filename), inception)  # for the FID
        setting = f"{args.device}, {args.precision}, {args.max_channels} channels; Ctrl-C saves"
        print(f"{'continuing' if start else 'new run'} from iteration {start + 1}: {setting}")
    signals = catch_signals()
    clock = time.perf_counter()

    for it in range(start + 1, args.iters + 1):
        # each iteration has a seed of its own: on a CPU, runs are resumed bit for bit
        torch.manual_seed(np.random.SeedSequence((args.seed, it)).generate_state(1).item())
        x_real = [batches[(it - 1) * n_real + step] for step in range(n_real)]
        shape = (args.batch_size, args.z_dim)  # of all processes together
        z = [torch.randn(shape, device=device).chunk(WORLD)[RANK] for _ in range(args.d_steps + 1)]
        losses = train_iteration(x_real, z, G, D, opt_G, opt_D, args)

        # average G over about the last tenth of the run so far (power function: arXiv 2312.02696)
        rate = 1 - (1 - 1 / it) ** (1 / args.average) if args.average else 1
        for averaged, current in zip(G_ema.parameters(), G.parameters(), strict=True):
            averaged.detach().lerp_(current.detach(), rate)

        stop = it == args.iters or (WORLD == 1 and len(signals) > 0)
        if WORLD > 1 and it % 10 == 0:  # several processes can only stop together
            votes = torch.tensor(len(signals), device=device)
            torch.distributed.all_reduce(votes)
            stop = stop or votes.item() > 0
        # every FID needs a save, and every save or grid a row of the log
        fid_now = due(it, args.fid_every, also=args.iters)
        save_now = due(it, args.save_every) or fid_now or stop
        grid_now = due(it, args.sample_every, also=100) or stop
        log_now = due(it, args.log_every, also=1) or save_now or grid_now
        if RANK == 0 and log_now:  # the log holds the first process's losses
            row = {"iter": it, **{name: loss.item() for name, loss in losses.items()}}
            lap = time.perf_counter() - clock  # without saving, grids and FID
            if not all(weight.isfinite().all() for weight in G.parameters()):
                raise FloatingPointError("G is not finite: --resume with a lower --lr")
            done, sec = (log[-1]["iter"], log[-1]["sec"]) if log else (0, 0.0)
            speed = (it - done) / lap  # iterations a second
            row |= {"sec": sec + lap, "img_per_sec": speed * args.d_steps * args.batch_size}
            left = f"{timedelta(seconds=round((args.iters - it) / speed))} to iter {args.iters}"
            log.append(row)
            if save_now or grid_now:
                update_bn(z_fixed[:2048].split(32), G_ema)  # its weights alone were averaged
            if save_now:
                save(out / "last.pt", it, args, log, state)
            if grid_now:
                grid = generate(G_ema, z_fixed[: columns**2])
                data.save_grid(grid, out / "samples" / f"{it:06d}.png", columns)
            if fid_now:  # after the save, for it takes long and much memory
                row |= measure_fid(G_ema, z_fixed[: args.fid_samples], inception, real, signals)
            if "fid" in row:
                if row["fid"] == min(old["fid"] for old in log if "fid" in old):
                    save(out / "best.pt", it, args, log, state)
                save(out / "last.pt", it, args, log, state)  # again, with the FID
            with open(out / "log.jsonl", "a") as file:  # first: print fails in a closed terminal
                file.write(json.dumps(row) + "\n")
            print(*(f"{k} {v:.6g}" for k, v in row.items()), left, sep="  ", flush=True)
            clock = time.perf_counter()
        if stop:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook needs Ctrl-C afterwards
    if RANK == 0:
        more = "--resume" if log[-1]["iter"] < args.iters else "--resume --iters N"
        print(f"saved at iteration {log[-1]['iter']} of {args.iters} in {out}; {more} continues")


def due(it, every, also=None):
    return every > 0 and (it % every == 0 or it == also)


def catch_signals():
    """-> a list, empty until Ctrl-C, `kill` or a closed terminal asks the run to save and end."""
    signals = []

    def catch(number, frame):
        signals.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(number, signal.default_int_handler)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
            signal.signal(number, catch)
    return signals


# ------------------------------------------------------------------------------ the run's folder
def start_folder(out, args, log):
    """Write args.json and log.jsonl, the latter without rows that are newer than the checkpoint."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    head = {**vars(args), **versions, "device_name": device_name}
    with data.atomic_write(out / "args.json") as beside:
        beside.write_text(json.dumps(head, indent=1))
    with data.atomic_write(out / "log.jsonl") as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in log))


def save(path, it, args, log, state):
    """Write a checkpoint, from which the run can be continued and images can be made."""
    checkpoint = {"iter": it, "args": vars(args), "log": log}
    checkpoint |= {name: part.state_dict() for name, part in state.items()}
    with data.atomic_write(path) as beside:
        torch.save(checkpoint, beside)


@torch.no_grad()
def generate(G, z):
    """Noise (N, z_dim) -> uint8 images (N, 3, S, S), without autocast; G is in evaluation mode."""
    return torch.cat([((G(part) + 1) * 127.5).round().byte() for part in z.split(32)])


def measure_fid(G, z, inception, real_stats, signals):
    stats = fid.FeatureStats()
    for part in z.split(64):
        if signals:
            return {}  # the run is about to end
        stats.update(inception(generate(G, part)))
    return {"fid": fid.frechet_distance(stats.mean, stats.cov, *real_stats)}


def sample(args):
    """Write images of the generator in args.sample to args.out: one grid, or a folder of PNGs."""
    checkpoint = torch.load(args.sample, map_location="cpu", weights_only=True)
    flags = checkpoint["args"]
    G = Generator(flags["img_size"], flags["z_dim"], flags["max_channels"]).eval()
    G.to(args.device).load_state_dict(checkpoint["G_ema"])
    rng = torch.Generator().manual_seed(args.seed)
    z = torch.randn(args.num_samples, flags["z_dim"], generator=rng).to(args.device)
    out = Path(args.out or f"{args.sample}-seed{args.seed}.png")
    if data.is_picture(out):
        data.save_grid(generate(G, z), out, math.ceil(len(z) ** 0.5))
    elif out.exists():
        raise ValueError(f"{out} exists: name a new folder, or a picture such as x.png")
    else:
        out.mkdir(parents=True)
        for i, part in enumerate(z.split(32)):
            for j, image in enumerate(generate(G, part), 32 * i):
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
    flag("--batch-size", type=int, help="over all processes (None: 64, from 512 px on 32)")
    flag("--lr", type=float, help="learning rate (None: 2e-4 * 1024 / channels, at least 2e-4)")
    flag("--betas", type=float, nargs=2, default=[0.5, 0.999], help="betas of Adam")
    flag("--z-dim", type=int, default=128, help="dimensions of the noise")
    flag("--max-channels", type=int, help="channels of a layer at most (None: 2048, on a CPU 128)")
    flag("--average", type=float, default=0.1, help="share of the run so far in G's average")
    flag("--seed", type=int, default=0, help="random seed")
    flag("--device", choices=devices, default=devices[0], help="cuda if torch finds a GPU")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="bf16 on newer GPUs")
    flag("--out", help="folder of the run (None: runs/SCRIPT-SIZE), or what --sample writes")
    flag("--resume", action="store_true", help="continue the run in --out with its flags, or start")
    flag("--log-every", type=int, default=50, help="iterations between log rows (0: off)")
    flag("--sample-every", type=int, default=500, help="iterations between grids (0: at the end)")
    flag("--save-every", type=int, default=1000, help="iterations between saves (0: at the end)")
    flag("--fid-every", type=int, default=0, help="iterations between FIDs (0: off)")
    flag("--fid-samples", type=int, default=10000, help="generated images for each FID")
    flag("--fid-weights", help="file of Inception weights (None: download them)")
    flag("--sample", metavar="CKPT", help="do not train, but write images from this checkpoint")
    flag("--num-samples", type=int, default=64, help="images to write with --sample")
    args = parser.parse_args()
    if args.sample:
        return args, None

    args.out = args.out or f"runs/{Path(__file__).stem}-{args.img_size}"
    checkpoint = {"iter": 0, "log": []}  # of a new run
    last = Path(args.out, "last.pt")
    if last.exists():
        if not args.resume:
            raise ValueError(f"{args.out} holds a run: add --resume, or name another --out")
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        parser.set_defaults(**checkpoint["args"] | {"out": args.out, "device": args.device})
        args = parser.parse_args()  # typed flags win over the checkpoint's
    if args.batch_size is None:
        args.batch_size = 64 if args.img_size < 512 else 32
    if args.max_channels is None:
        args.max_channels = 2048 if args.device == "cuda" else 128
    args.max_channels = layer_widths(args.img_size, args.max_channels)[-1]
    if args.lr is None:
        args.lr = 2e-4 * max(1, 1024 / args.max_channels)  # narrower networks want more: see README
    if args.precision == "auto":
        native = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if native else "fp32"
    data.check_outside(args.out, args.data)
    if min(args.iters, args.d_steps) < 1 or args.seed < 0 or not 0 <= args.average <= 1:
        raise ValueError("--iters and --d-steps start at 1, --seed at 0; --average is from 0 to 1")
    if args.batch_size < 2 * WORLD or args.batch_size % WORLD:
        raise ValueError("--batch-size must divide among the processes, with at least 2 for each")
    return args, checkpoint


def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]    (-h lists them)",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    try:
        args, checkpoint = parse_args(parser)
        if args.sample:
            return sample(args) if RANK == 0 else None  # one process writes them all
        if WORLD > 1:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group(timeout=timedelta(hours=1))  # an FID takes long
            shared = [args, checkpoint]  # the first's: other machines may not see its files
            torch.distributed.broadcast_object_list(shared)
            args, checkpoint = shared
            if os.environ["LOCAL_RANK"] == "0":  # the first process on each machine
                data.load_images(args.data, args.img_size, args.cache_dir)
            torch.distributed.barrier()  # the others wait until the images are ready
        images = data.load_images(args.data, args.img_size, args.cache_dir, quiet=WORLD > 1)
        measures = args.fid_every > 0 and RANK == 0
        inception = fid.load_inception(args.fid_weights, args.device) if measures else None
    except (ValueError, OSError) as error:  # a mistake in the flags or the images
        parser.error(error)
    train(args, images, checkpoint, inception)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
