"""GAN-QP in one file: a quadratic potential in the dual space, no Lipschitz constraint and no vanishing gradient.

    discriminator:  max over T of  E[ delta - delta^2 / (2 lambda d(x_r, x_f)) ],  delta = T(x_r) - T(x_f)
    generator:      min over G of  E[ delta ]

d is the distance of each real image to the generated one that it is paired with, lambda = 10.

    python gan_qp.py --img-size 128 --data photos/       a folder or .zip of images; drawn faces without --data
    python gan_qp.py --sample runs/gan_qp-128/last.pt --out grid.png
    torchrun --nproc-per-node 8 gan_qp.py --img-size 512 --data photos/

Jianlin Su, "GAN-QP: A Novel GAN Framework without Gradient Vanishing and Lipschitz Constraint", arXiv 1811.07296.
"""
import argparse
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import make_grid

from data import CACHE_DIR, Batches, load_images
from fid import FeatureStats, array_stats, frechet_distance, load_inception

SCRIPT = Path(__file__).stem
SIZES = [16, 32, 64, 128, 256, 512, 1024]


# ---------------------------------------------------------------- networks

def layer_widths(img_size, max_channels=None):
    """Channels of the log2(size) - 2 hidden layers, narrow to wide; the widest has 8 * size, 2048 at most."""
    n = int(math.log2(img_size)) - 3
    widest = min(8 * img_size, max_channels or 2048)
    if img_size not in SIZES or widest < 2 ** n:
        raise ValueError(f"size {img_size} with at most {widest} channels: the size must be one of {SIZES}, "
                         f"and there must be at least {2 ** max(n, 1)} channels")
    return [widest >> i for i in range(n, -1, -1)]


def glorot(module):
    """Glorot uniform weights, zero biases: Keras' defaults, which the paper trained with."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """Standard normal noise (B, z_dim) -> images (B, 3, img_size, img_size) in [-1, 1], float32."""

    def __init__(self, img_size, z_dim=128, max_channels=None):
        super().__init__()
        widths = layer_widths(img_size, max_channels)[::-1]
        self.linear = nn.Linear(z_dim, 16 * widths[0])
        self.norm = nn.BatchNorm1d(16 * widths[0], eps=1e-3, momentum=0.01)
        layers = []
        for wide, narrow in zip(widths, widths[1:]):
            layers += [nn.ConvTranspose2d(wide, narrow, 5, stride=2, padding=2, output_padding=1),
                       nn.BatchNorm2d(narrow, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True)]
        layers.append(nn.ConvTranspose2d(widths[-1], 3, 5, stride=2, padding=2, output_padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(glorot)

    def forward(self, z):
        x = F.relu(self.norm(self.linear(z)))
        x = x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # channels last without a copy
        return torch.tanh(self.layers(x).float())


class Discriminator(nn.Module):
    """Images (B, 3, img_size, img_size) in [-1, 1] -> raw scores (B,), float32; pairwise=True: of two such images."""

    def __init__(self, img_size, max_channels=None, pairwise=False):
        super().__init__()
        layers, channels = [], 6 if pairwise else 3
        for width in layer_widths(img_size, max_channels):
            layers.append(nn.Conv2d(channels, width, 5, stride=2, padding=2, bias=False))
            if len(layers) > 1:  # batch norm on all but the first
                layers.append(nn.BatchNorm2d(width, eps=1e-3, momentum=0.01))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = width
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(16 * channels, 1, bias=False)
        self.apply(glorot)

    def forward(self, x, y=None):
        x = self.layers(x if y is None else torch.cat([x, y], 1)).permute(0, 2, 3, 1).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # a difference of scores needs all their digits
            return self.linear(x.float()).squeeze(1)


# ---------------------------------------------------------------- losses

def pair_distance(x_real, x_fake, metric="l1"):
    """Distance of the i-th real to the i-th generated image: (B, ...), (B, ...) -> (B,).

    "l1": mean absolute difference over pixels and channels; "l2": root of the mean square difference.
    """
    difference = (x_real - x_fake).flatten(1)
    return difference.abs().mean(1) if metric == "l1" else difference.square().mean(1).sqrt()


def qp_divergence(delta, distance, lam=10.0, power=2):
    """delta - |delta|^k / (k (lam d)^(k-1)), whose mean the discriminator maximises: (B,), (B,) -> (B,).

    delta: T(x_r, x_f) - T(x_f, x_r); distance: of each pair; power k: 2 (the paper's), 4 or 6. The supremum is
    lam d (1 - 1/k), at delta = lam d. Never let it reach the generator, which minimises the mean of delta alone.
    """
    distance = distance.clamp_min(1e-4)  # a hundredth of a grey level: identical images must not divide by zero
    return delta - delta * (delta / (lam * distance)) ** (power - 1) / power


def discriminator_loss(D, x_real, x_fake, args):
    """-> (loss to minimise, estimate of the divergence, delta of each pair)"""
    delta = D(x_real, x_fake) - D(x_fake, x_real) if args.pairwise else D(x_real) - D(x_fake)
    divergence = qp_divergence(delta, pair_distance(x_real, x_fake, args.metric), args.lam, args.power).mean()
    return -divergence, divergence, delta


def generator_loss(D, x_real, x_fake, args):
    """-> loss to minimise: the mean of delta, without T(x_r) where that does not depend on the generator"""
    return (D(x_real, x_fake) - D(x_fake, x_real)).mean() if args.pairwise else -D(x_fake).mean()


# ---------------------------------------------------------------- helpers

def stop(message):
    """End with one line and exit code 2; of several processes only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{SCRIPT}.py: {message}", file=sys.stderr)
    sys.exit(2)


def update(optimizer, loss):
    """One step down the gradient of `loss`, averaged over the processes if there are several."""
    optimizer.zero_grad()
    loss.backward()
    if dist.is_initialized():  # not DistributedDataParallel: it does not see a gradient penalty's inner gradient
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([g.flatten() for g in grads]) / dist.get_world_size()
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(part.view(grad.shape))
    optimizer.step()


@torch.no_grad()
def generate(G, z):
    """Noise (N, z_dim) -> uint8 images (N, 3, S, S), in evaluation mode and fp32, rounded."""
    G.eval()
    images = torch.cat([((G.forward(part) + 1) * 127.5).round().byte() for part in z.split(32)])  # .forward: not compiled
    G.train()
    return images


def save_grid(images, path, columns=9):
    """uint8 (N, 3, S, S) -> one picture, `columns` images wide."""
    Image.fromarray(make_grid(images.cpu(), columns).permute(1, 2, 0).numpy()).save(path)


def save_gif(folder, path, frames=50):
    """The sample grids in `folder` as an animation of at most so many frames."""
    files = sorted(folder.glob("*.png"), key=lambda f: int(f.stem))
    files = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, frames).round().astype(int))]
    pictures = [Image.open(f) for f in files]
    for picture in pictures:
        picture.thumbnail((600, 600))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=150, loop=0)


def save_checkpoint(state, path):
    """Write beside, flush, rename: whatever happens, `path` is the old file or the new one, whole."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        stop(f"{path} could not be written ({str(error).splitlines()[0]}); the checkpoint before it, if any, is intact")


def load_checkpoint(path):
    """-> what `save_checkpoint` wrote; refuses anything else, and runs no code from it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            stop(f"{path} is a checkpoint of {checkpoint['script']}.py; sample or resume it with that script")
        return checkpoint
    except Exception as error:
        stop(f"{path} is not a whole checkpoint of {SCRIPT}.py ({type(error).__name__}); name another")


def measure_fid(G, inception, real, args, device):
    """FID of --fid-samples generated images against `real`, (mu, sigma); the processes share the work."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stats = [FeatureStats() for _ in range(world)]
    for buffer in G.buffers() if world > 1 else ():  # without synchronised batch norm they differ a little
        dist.broadcast(buffer, 0)
    for i in range(50 * rank, args.fid_samples, 50 * world):  # the same noise every time
        z = torch.randn(50, args.z_dim, generator=torch.Generator().manual_seed(args.seed + i))[:args.fid_samples - i]
        stats[rank].update(inception(generate(G, z.to(device))))
    if world > 1:
        dist.all_gather_object(stats, stats[rank])
    for other in stats[1:]:
        stats[0].merge(other)
    return frechet_distance(stats[0].mean, stats[0].cov, *real) if rank == 0 else math.inf


# ---------------------------------------------------------------- training

def train(args):
    device, out = torch.device(args.device), Path(args.out)
    rank, world = 0, 1
    if dist.is_torchelastic_launched():  # torchrun: one process a GPU
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
        rank, world = dist.get_rank(), dist.get_world_size()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if args.batch_size % world or args.batch_size < 2 * world:
            stop(f"--batch-size {args.batch_size} does not divide among {world} processes, two images each or more")
    checkpoint = load_checkpoint(out / "last.pt") if args.resume else None
    if checkpoint:
        for name, value in checkpoint["args"].items():
            if name not in MAY_CHANGE and value != vars(args)[name]:
                flag = "--" + name.replace("_", "-")
                stop(f"{flag} {vars(args)[name]} contradicts the run in {out}, which has {flag} {value}")
    try:
        if rank > 0:
            dist.barrier()  # the first process prepares the data, the others find them
        images = load_images(args.data, args.img_size, args.cache_dir, quiet=rank > 0)
        if rank == 0 and world > 1:
            dist.barrier()
        if args.fid_every:
            inception = load_inception(args.fid_weights, device)
            real_stats = array_stats(images, inception) if rank == 0 else None
    except ValueError as error:
        stop(error)

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    bf16 = args.precision == "bf16" or args.precision == "auto" and (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    batches = Batches(images, args.batch_size, device, args.seed, args.flip, rank, world)
    reals = args.d_steps + args.pairwise  # batches of real images in an iteration
    torch.manual_seed(args.seed)
    G, D = Generator(args.img_size, args.z_dim, args.max_channels), Discriminator(args.img_size, args.max_channels, args.pairwise)
    if device.type == "cuda" and world > 1:
        G, D = nn.SyncBatchNorm.convert_sync_batchnorm(G), nn.SyncBatchNorm.convert_sync_batchnorm(D)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, args.betas, eps=1e-7, fused=device.type != "mps") for net in (G, D))
    ema = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None
    fixed_z = torch.randn(81, args.z_dim).to(device)
    first, sec, best_fid = 0, 0.0, math.inf
    parts = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D} | ({"ema": ema} if ema else {})
    if checkpoint:
        first, sec, best_fid = (checkpoint[name] for name in ("iter", "sec", "best_fid"))
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        del checkpoint
    if args.compile:
        G.compile()
        D.compile()

    def save(name):
        state = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint({"script": SCRIPT, "iter": it, "sec": sec, "best_fid": best_fid, "args": vars(args), **state}, out / name)

    it = first
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        if not args.resume:
            save("last.pt")  # a run can be resumed from its very start, and a folder that cannot be written shows now
            picks = np.linspace(0, len(images) - 1, min(81, len(images))).astype(int)
            save_grid(torch.from_numpy(images[picks]).permute(0, 3, 1, 2), out / "real.png")
        versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
                    "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()}
        (out / "args.json").write_text(json.dumps({**vars(args), **versions}, indent=1))
        log = (out / "log.jsonl").read_text().splitlines(True) if args.resume and (out / "log.jsonl").exists() else []
        log = [line for line in log if line.endswith("\n") and json.loads(line)["iter"] <= first]
        (out / "log.tmp").write_text("".join(log))  # cut back to the checkpoint
        os.replace(out / "log.tmp", out / "log.jsonl")
    stopping = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stopping.append(number), signal.signal(number, signal.SIG_DFL)))
    history, saved, marked, mark = [], first, first, time.perf_counter()
    began = mark - sec

    for it in range(first + 1, args.iters + 1):
        torch.manual_seed(int(np.random.SeedSequence((args.seed, it)).generate_state(1)[0]))
        z = torch.randn(args.d_steps + 1, args.batch_size, args.z_dim, device=device)[:, batches.local]
        for step in range(args.d_steps):
            x_real = batches[(it - 1) * reals + step]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), torch.no_grad():
                x_fake = G(z[step])
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                d_loss, divergence, delta = discriminator_loss(D, x_real, x_fake, args)
            update(opt_D, d_loss)
        lipschitz = (delta.abs() / pair_distance(x_real, x_fake).clamp_min(1e-4)).mean()
        x_real = batches[it * reals - 1] if reals > args.d_steps else None  # only a discriminator of pairs looks at it
        D.requires_grad_(False)  # no gradients that nobody uses
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            g_loss = generator_loss(D, x_real, G(z[-1]), args)
        update(opt_G, g_loss)
        D.requires_grad_(True)
        if ema:
            ema.update_parameters(G)
        history.append(torch.stack([d_loss, g_loss, divergence, lipschitz]).detach())

        # what follows waits for the device, and so is done at log points and the like only
        due = {name for name in ("log", "sample", "save", "fid") if (every := vars(args)[name + "_every"])
               and (it % every == 0 or it == args.iters)}
        if not due and not (stopping and world == 1):
            continue
        table = F.pad(torch.stack(history), (0, 1), value=len(stopping))
        if world > 1:
            dist.all_reduce(table)
        rows, history = (table / world).tolist(), []
        for i, row in enumerate(rows, start=it + 1 - len(rows)):
            if not all(map(math.isfinite, row)):
                stop(f"the loss of iteration {i} is not finite; try a lower --lr; the last good checkpoint is {out / 'last.pt'} (iteration {saved})")
        sec, leave = time.perf_counter() - began, rows[-1].pop() > 0
        record = {"iter": it, **dict(zip(("d_loss", "g_loss", "divergence", "lipschitz"), rows[-1])), "sec": round(sec, 2),
                  "img_per_sec": round((it - marked) * args.d_steps * args.batch_size / (time.perf_counter() - mark), 1)}
        shown = ema.module if ema else G
        if "fid" in due:
            record["fid"] = measure_fid(shown, inception, real_stats, args, device)
        if rank == 0 and due & {"log", "fid"}:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            left = timedelta(seconds=round((args.iters - it) * (time.perf_counter() - mark) / max(1, it - marked)))
            line = (f"{it}/{args.iters}  d_loss {rows[-1][0]:.3f}  g_loss {rows[-1][1]:.3f}  divergence {rows[-1][2]:.3f}  |delta|/d {rows[-1][3]:.2f}"
                    f"  {record['img_per_sec']:.0f} img/s  {left} left" + (f"  fid {record['fid']:.2f}" if "fid" in due else ""))
            print(f"\r{line}\033[K" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)
        if rank == 0 and "sample" in due:
            save_grid(generate(shown, fixed_z), out / "samples" / f"{it:06d}.png")
        if rank == 0 and (leave or due & {"save", "fid"}):
            if not all(p.isfinite().all() for net in (G, D) for p in net.parameters()):
                stop(f"the weights of iteration {it} are not finite; try a lower --lr; the last good checkpoint is {out / 'last.pt'} (iteration {saved})")
            if record.get("fid", math.inf) < best_fid:
                best_fid = record["fid"]
                save("best.pt")
            if leave or "save" in due:
                save("last.pt")
                saved = it
        mark, marked = time.perf_counter(), it
        if leave:
            break
    if rank == 0:
        print("\n" * sys.stdout.isatty(), end="")
        if it < args.iters:
            words = [word for word in sys.argv if word != "--resume"]
            print(f"stopped and saved at iteration {it}; go on with: python {shlex.join(words)} --resume")
        else:
            save_gif(out / "samples", out / "progress.gif")
            print(f"done: pictures in {out / 'samples'}, {out / 'progress.gif'}; weights in {out / 'last.pt'}")
    if world > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------- sampling

def slerp(a, b, steps):
    """Spherical interpolation from noise a to noise b: (N, z_dim), (N, z_dim) -> (N * steps, z_dim)."""
    angle = F.cosine_similarity(a, b).clamp(-1, 1).acos()[:, None, None]
    t = torch.linspace(0, 1, steps)[:, None]
    path = (torch.sin((1 - t) * angle) * a[:, None] + torch.sin(t * angle) * b[:, None]) / torch.sin(angle)
    return path.flatten(0, 1)


def sample(args):
    checkpoint, out = load_checkpoint(args.sample), Path(args.out)
    try:
        trained = checkpoint["args"]
        G = Generator(trained["img_size"], trained["z_dim"], trained["max_channels"])
        if "ema" in checkpoint:
            average = AveragedModel(G)
            average.load_state_dict(checkpoint["ema"])
            G = average.module
        else:
            G.load_state_dict(checkpoint["G"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        stop(f"{args.sample} does not fit the generator: {str(error).splitlines()[0]}")
    G.to(args.device, memory_format=torch.channels_last)
    z = torch.randn(args.num_samples, trained["z_dim"], generator=torch.Generator().manual_seed(args.seed))
    columns = 8 if args.interpolate else math.ceil(math.sqrt(args.num_samples))
    if args.interpolate:
        rows = math.ceil(args.num_samples / 8)
        ends = torch.randn(2 * rows, trained["z_dim"], generator=torch.Generator().manual_seed(args.seed))
        z = slerp(ends[:rows], ends[rows:], 8)[:args.num_samples]
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        save_grid(generate(G, z.to(args.device)), out, columns)
    else:
        out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(z), 64):
            for i, image in enumerate(generate(G, z[start:start + 64].to(args.device)).cpu(), start):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{i:05d}.png")
    print(f"{len(z)} images in {out}")


# ---------------------------------------------------------------- command line

MAY_CHANGE = {"iters", "device", "precision", "compile", "out", "resume", "cache_dir", "log_every", "sample_every", "save_every",
              "fid_every", "fid_samples", "fid_weights", "sample", "num_samples", "interpolate"}  # when a run is resumed


def number(kind, low, high):
    """A type for argparse: an int or float within bounds, both included."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = stop
    count, some = number(int, 1, 10 ** 9), number(int, 0, 10 ** 9)
    flag = parser.add_argument
    flag("--data", default="synthetic", help="a folder, a .zip, torchvision:NAME, synthetic or synthetic:N (drawn faces)")
    flag("--img-size", type=int, default=128, choices=SIZES, help="side of the images in pixels (128)")
    flag("--batch-size", type=number(int, 2, 10 ** 6), help="over all processes together (64; 32 from 512 px on)")
    flag("--iters", type=count, default=100000, help="generator updates (100000)")
    flag("--d-steps", type=count, default=2, help="discriminator updates for each of them (2)")
    flag("--lr", type=number(float, 1e-9, 1), default=2e-4, help="Adam's learning rate (2e-4)")
    flag("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.5, 0.999], help="Adam's betas (0.5 0.999)")
    flag("--metric", choices=["l1", "l2"], default="l1", help="distance of two images (l1)")
    flag("--lam", type=number(float, 1e-6, 1e6), default=10.0, help="lambda, the scale of the divergence (10)")
    flag("--power", type=int, choices=[2, 4, 6], default=2, help="of delta in the potential (2)")
    flag("--pairwise", action="store_true", help="a discriminator of two images")
    flag("--z-dim", type=number(int, 2, 10 ** 5), default=128, help="dimensions of the noise (128)")
    flag("--max-channels", type=number(int, 2, 10 ** 5), default=2048, help="widest layer at most (2048)")
    flag("--ema", type=number(float, 0, 0.999999), default=0.0, help="decay of an average of the generator, for samples and FID (0: off)")
    flag("--flip", action="store_true", help="random horizontal flips")
    flag("--seed", type=number(int, 0, 2 ** 31), default=0, help="of everything random (0)")
    flag("--device", help="cuda, mps or cpu (the first of them that is there)")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: autocast, losses in fp32 (auto: where the hardware has it)")
    flag("--compile", action="store_true", help="torch.compile the networks")
    flag("--out", help="the run's folder (runs/<script>-<size>); with --sample an x.png for a grid, or a folder")
    flag("--resume", action="store_true", help="go on from last.pt in --out")
    flag("--log-every", type=count, default=50, help="iterations (50)")
    flag("--sample-every", type=count, default=500, help="iterations (500)")
    flag("--save-every", type=count, default=1000, help="iterations (1000)")
    flag("--fid-every", type=some, default=0, help="iterations (0: never)")
    flag("--fid-samples", type=number(int, 2, 10 ** 7), default=10000, help="generated images for the FID (10000)")
    flag("--fid-weights", help="file of Inception weights (the published ones, downloaded once)")
    flag("--cache-dir", default=CACHE_DIR, help=f"for prepared data and statistics ({CACHE_DIR})")
    flag("--sample", metavar="CKPT", help="no training: draw images from this checkpoint, with --seed, into --out")
    flag("--num-samples", type=count, default=64, help="how many (64)")
    flag("--interpolate", action="store_true", help="rows of 8 on the sphere from one noise to another")
    args = parser.parse_args()

    args.batch_size = args.batch_size or (64 if args.img_size < 512 else 32)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    args.device = args.device or ("cuda" if cuda else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=args.device)
    except Exception as error:
        stop(f"--device {args.device} is not to be had here ({str(error).splitlines()[0]}); try --device cpu")
    try:
        layer_widths(args.img_size, args.max_channels)
    except ValueError as error:
        stop(f"--max-channels {args.max_channels}: {error}")
    default_out = f"{Path(args.sample).with_suffix('')}-{args.seed}.png" if args.sample else f"runs/{SCRIPT}-{args.img_size}"
    args.out = args.out or default_out
    out = Path(args.out)
    if args.sample:
        if out.is_file() or any(out.glob("*.png")):
            stop(f"--out {out} is there already; name a new file or folder")
    elif args.resume:
        if not (out / "last.pt").exists():
            stop(f"--resume: there is no last.pt in --out {out}; name the folder of a run, or start one without --resume")
    else:
        for name in ("last.pt", "best.pt", "log.jsonl", "args.json", "real.png", "samples", "progress.gif"):
            if (out / name).exists():
                stop(f"--out {out} already holds {name} of a run; go on with it by --resume, or name another folder")
    return args


def main():
    args = parse_args()
    try:
        sample(args) if args.sample else train(args)
    except OSError as error:
        stop(error)
    except KeyboardInterrupt:
        stop("interrupted")


if __name__ == "__main__":
    main()
