"""SGAN-SN in one file: the original GAN, its discriminator held smooth by spectral normalisation.

    discriminator   max over T of  E[ log sigmoid(T(x_r)) ] + E[ log(1 - sigmoid(T(x_f))) ]
    generator       min over G of  E[ -log sigmoid(T(x_f)) ]

    python sgan_sn.py --img-size 128 --data photos/           a folder or .zip; without --data, drawn faces
    python sgan_sn.py --img-size 128 --data photos/ --resume  after Ctrl-C, a crash or a power cut
    python sgan_sn.py --sample runs/sgan_sn-128/last.pt --out grid.png
    torchrun --nproc-per-node 8 sgan_sn.py --img-size 512 --data photos/

Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv 1802.05957.
"""
import argparse, copy, json, math, os, platform, signal, sys, time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported after a process group is made, it would keep that alive
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached
from torch.optim.swa_utils import update_bn

from data import CACHE_DIR, Batches, load_images, pick, replacing, save_gif, save_grid
from fid import array_stats, drawn_stats, frechet_distance, load_inception

SCRIPT = Path(__file__).stem
SIZES = [16, 32, 64, 128, 256, 512, 1024]
RANK = int(os.environ.get("RANK", 0))  # which process this is, and of how many: torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RUN_FILES = ["last.pt", "best.pt", "log.jsonl", "args.json", "real.png", "samples", "progress.gif"]
# flags that may change when a run is resumed; the others make it what it is
MAY_CHANGE = ["cache_dir", "iters", "device", "precision", "out", "resume", "log_every", "sample_every",
              "save_every", "fid_every", "fid_samples", "fid_weights", "sample", "num_samples", "interpolate"]

# ---------------------------------------------------------------- command line
def stop(message):
    """End with one line and exit code 2; of several processes only the first speaks."""
    if RANK == 0:
        print(f"{SCRIPT}.py: {message}", file=sys.stderr)
    sys.exit(2)

def number(kind, low, high):
    """A type for argparse: an int or a float within bounds, both included."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse

def parse_args():
    here = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    count = number(int, 1, 1_000_000_000)
    wide = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=wide, allow_abbrev=False)
    parser.error = stop
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="synthetic", help="folder, .zip, torchvision:NAME or synthetic[:N] (drawn faces)")
    flag("--img-size", type=int, default=128, choices=SIZES, help="side of the images in pixels (128)")
    flag("--flip", action="store_true", help="random horizontal flips")
    flag("--cache-dir", default=CACHE_DIR, help=f"for prepared data and statistics ({CACHE_DIR})")
    flag = parser.add_argument_group("divergence").add_argument
    flag("--no-sn", action="store_true", help="plain SGAN: batch norm instead of spectral normalisation")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--iters", type=count, default=100000, help="generator updates (100000)")
    flag("--d-steps", type=count, default=1, help="discriminator updates for each of them (1)")
    flag("--batch-size", type=number(int, 2, 1_000_000), help="over all processes (64; 32 from 512 px on)")
    flag("--lr", type=number(float, 1e-9, 1), default=2e-4, help="Adam's learning rate (2e-4)")
    flag("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.5, 0.999], help="Adam's (0.5 0.999)")
    flag("--z-dim", type=number(int, 2, 100_000), default=128, help="dimensions of the noise (128)")
    flag("--max-channels", type=number(int, 2, 100_000), default=2048, help="of the widest layer (2048)")
    flag("--ema", type=number(float, 0, 0.999999), default=0.0, help="decay of G's average (0: off)")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of everything random (0)")
    flag = parser.add_argument_group("the run").add_argument
    flag("--device", default=here, help=f"cuda, mps or cpu ({here})")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto",
         help="bf16: autocast, and TF32 for the rest, but losses in fp32; auto: bf16 if the hardware has it")
    flag("--out", help=f"the run's folder (runs/{SCRIPT}-<size>); with --sample a .png (a grid) or a folder")
    flag("--resume", action="store_true", help="go on from last.pt in --out")
    flag("--log-every", type=count, default=50, help="iterations (50)")
    flag("--sample-every", type=count, default=500, help="iterations (500)")
    flag("--save-every", type=count, default=1000, help="iterations (1000)")
    flag("--fid-every", type=number(int, 0, 1_000_000_000), default=0, help="iterations (0: never)")
    flag("--fid-samples", type=number(int, 2, 10_000_000), default=10000, help="images drawn for FID (10000)")
    flag("--fid-weights", help="file of Inception weights (the published ones, downloaded once)")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--sample", metavar="CKPT", help="no training: images from this checkpoint, with --seed, into --out")
    flag("--num-samples", type=count, default=64, help="how many (64)")
    flag("--interpolate", action="store_true", help="rows of 8 on the sphere, from one noise to another")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (64 if args.img_size < 512 else 32)
    if not args.out:
        args.out = f"{args.sample}-seed{args.seed}.png" if args.sample else f"runs/{SCRIPT}-{args.img_size}"
    check_device(args.device)
    return args

def check_device(device):
    """Refuse a device that is not there; of several GPUs, take the one that is this process's own."""
    gpus = torch.cuda.device_count()
    if device == "cuda" and 0 < gpus < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        stop(f"there are fewer GPUs, {gpus}, than processes; give torchrun a lower --nproc-per-node")
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device)
    except Exception as error:
        stop(f"--device {device} is not available ({str(error).splitlines()[0]}); try --device cpu")

# ---------------------------------------------------------------- networks
def layer_widths(img_size, max_channels=None):
    """Channels of the log2(size) - 2 hidden layers, narrow to wide: the widest has 8 * size, 2048 at most."""
    n = int(math.log2(img_size)) - 3
    widest = min(8 * img_size, max_channels or 2048)
    if img_size not in SIZES or widest < 2**n:
        raise ValueError(f"--img-size must be one of {SIZES}, with --max-channels {2**max(n, 1)} or more")
    return [widest >> i for i in range(n, -1, -1)]

def glorot(module):
    """Glorot uniform weights and zero biases: Keras' defaults, which the paper trained with."""
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
            layers.append(nn.ConvTranspose2d(wide, narrow, 5, stride=2, padding=2, output_padding=1))
            layers += [nn.BatchNorm2d(narrow, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True)]
        layers.append(nn.ConvTranspose2d(widths[-1], 3, 5, stride=2, padding=2, output_padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(glorot)

    def forward(self, z):
        x = F.relu(self.norm(self.linear(z)))
        x = x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # channels last without a copy
        return torch.tanh(self.layers(x).to(z.dtype))

class Discriminator(nn.Module):
    """Images (B, 3, img_size, img_size) in [-1, 1] -> raw scores (B,), float32.

    sn: biases in place of batch norm (without either, T(a x) = a T(x), and a faint image scores near 0).
    """
    def __init__(self, img_size, max_channels=None, sn=True):
        super().__init__()
        widths = layer_widths(img_size, max_channels)
        layers = []
        for before, width in zip([3, *widths], widths):
            layers.append(nn.Conv2d(before, width, 5, stride=2, padding=2, bias=sn))
            if not sn and len(layers) > 1:  # on all but the first
                layers.append(nn.BatchNorm2d(width, eps=1e-3, momentum=0.01))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(16 * widths[-1], 1, bias=sn)
        self.apply(glorot)
        for layer in [*layers[::2], self.linear] if sn else ():
            spectral_norm(layer)

    def forward(self, x):
        features = self.layers(x).permute(0, 2, 3, 1).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # a difference of scores needs all their digits
            return self.linear(features.to(x.dtype)).squeeze(1)

# ---------------------------------------------------------------- the divergence
def pair_distance(x_real, x_fake, metric="l1"):
    """Distance of each pair: mean absolute difference, or "l2" root mean square. Twice (B, ...) -> (B,)"""
    difference = (x_real - x_fake).flatten(1)
    return difference.abs().mean(1) if metric == "l1" else difference.square().mean(1).sqrt()

def js_divergence(score_real, score_fake):
    """1/2 E[log sigmoid(T_r)] + 1/2 E[log(1 - sigmoid(T_f))] + log 2, Jensen-Shannon: (B,), (B,) -> ()."""
    return math.log(2) - (F.softplus(-score_real).mean() + F.softplus(score_fake).mean()) / 2

def discriminator_loss(D, x_real, x_fake, args):
    """-> (loss to minimise, estimate of the divergence, mean |delta| / d)"""
    with cached():  # one spectral norm for both passes
        score_real = D(x_real)
        score_fake = D(x_fake)
    divergence = js_divergence(score_real, score_fake)
    distance = pair_distance(x_real, x_fake).clamp_min(1e-4)
    return 2 * (math.log(2) - divergence), divergence, ((score_real - score_fake).abs() / distance).mean()

def generator_loss(D, x_real, x_fake, args):
    """-> loss to minimise: E[-log sigmoid(T(x_f))], which does not saturate while T is right"""
    return F.softplus(-D(x_fake)).mean()

# ---------------------------------------------------------------- helpers
def update(optimizer, loss):
    """One step down the gradient of `loss`, averaged over the processes."""
    optimizer.zero_grad()
    loss.backward()
    if WORLD > 1:  # not DistributedDataParallel: it does not see the gradient within a gradient penalty
        for p in optimizer.param_groups[0]["params"]:
            dist.all_reduce(p.grad.div_(WORLD))
    optimizer.step()

def set_precision(precision, device):
    """-> "bf16" or "fp32"; with bf16, what autocast leaves may be TF32, else fp32 means fp32."""
    if precision == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "auto":
        bf16 = torch.cpu._is_avx512_bf16_supported()
    else:
        bf16 = precision == "bf16"
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16
    torch.backends.cudnn.benchmark = True
    return "bf16" if bf16 else "fp32"

@torch.no_grad()
def generate(G, z):
    """Noise (N, z_dim) -> uint8 images (N, S, S, 3), in evaluation mode and without autocast."""
    G.eval()
    images = torch.cat([((G(part) + 1) * 127.5).round().byte() for part in z.split(32)])
    G.train()
    return images.permute(0, 2, 3, 1)

def load_checkpoint(path):
    """-> what `train` saved; anything else is refused, and no code in it run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == SCRIPT and checkpoint["shown"]:
            return checkpoint
        reason = f"of {checkpoint['script']}.py"
    except Exception as error:
        reason = type(error).__name__  # torch's own text is many lines
    stop(f"{path} is not a whole checkpoint of {SCRIPT}.py ({reason}); name another (--out, for --resume)")

def open_run(args):
    """-> what a run that is resumed has saved; a new one starts at 0. Refuses what would mix two runs."""
    out = Path(args.out)
    if not args.resume:
        if any((out / name).exists() for name in RUN_FILES):
            stop(f"--out {out} already holds a run; go on with it by --resume, or name another folder")
        return {"iter": 0, "log": []}
    saved = load_checkpoint(out / "last.pt")
    for name, old in saved["args"].items():
        new = vars(args).get(name)
        flag = "--" + name.replace("_", "-")
        if new != old and name not in MAY_CHANGE:
            stop(f"{flag} {new} contradicts the run in {out}, which has {flag} {old}")
    return saved

# ---------------------------------------------------------------- training
def train(args):
    """Train, or go on from last.pt, up to args.iters or a signal; all that comes of it is in args.out."""
    device = torch.device(args.device)
    out = Path(args.out)
    saved = open_run(args)
    log = saved["log"]
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        layer_widths(args.img_size, args.max_channels)
        images = load_images(args.data, args.img_size, args.cache_dir, quiet=RANK > 0)
        batches = Batches(images, args.batch_size, device, args.seed, args.flip, RANK, WORLD)
        if args.fid_every and RANK == 0:
            inception = load_inception(args.fid_weights, device)
            real_stats = array_stats(images, inception)
    except ValueError as error:
        stop(error)

    precision = set_precision(args.precision, device)
    torch.manual_seed(args.seed)
    G = Generator(args.img_size, args.z_dim, args.max_channels)
    D = Discriminator(args.img_size, args.max_channels, sn=not args.no_sn)
    if WORLD > 1 and device.type == "cuda":
        G = nn.SyncBatchNorm.convert_sync_batchnorm(G)
        D = nn.SyncBatchNorm.convert_sync_batchnorm(D)
    G.to(device, memory_format=torch.channels_last)
    D.to(device, memory_format=torch.channels_last)
    adam = {"lr": args.lr, "betas": args.betas, "eps": 1e-7, "fused": device.type != "mps"}
    opt_G = torch.optim.Adam(G.parameters(), **adam)
    opt_D = torch.optim.Adam(D.parameters(), **adam)
    shown = copy.deepcopy(G) if args.ema else G  # the generator of samples and FID
    parts = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "shown": shown}
    for name in parts.keys() & saved.keys():
        parts[name].load_state_dict(saved[name])
    amp = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def noise():
        return torch.randn(args.batch_size, args.z_dim, device=device).chunk(WORLD)[RANK]

    def due(every):
        return every > 0 and (it % every == 0 or it == args.iters)

    def save(name):
        states = {key: part.state_dict() for key, part in parts.items()}
        with replacing(out / name) as file:
            torch.save({"script": SCRIPT, "iter": it, "log": log, "args": vars(args), **states}, file)

    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    fixed = torch.Generator().manual_seed(args.seed)
    fixed_z = torch.randn(max(2048, args.fid_samples), args.z_dim, generator=fixed).to(device)
    columns = min(9, 2048 // args.img_size)  # of a grid, so that it is about 2,000 px wide at most
    stopping = []
    signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    last = log[-1] if log else {"iter": 0, "sec": 0}
    began = time.perf_counter() - last["sec"]
    if RANK == 0:
        size_G, size_D = (sum(p.numel() for p in net.parameters()) for net in (G, D))
        print(f"{SCRIPT}: {len(images):,} images, {size_G:,} parameters in G, {size_D:,} in D, "
              f"{precision} on {device} ({device_name})", flush=True)

    it = start = saved["iter"]
    for it in range(start + 1, args.iters + 1):
        # all randomness of an iteration follows from the seed and its number: no generator states to save
        torch.manual_seed(int(np.random.SeedSequence((args.seed, it)).generate_state(1)[0]))
        first = (it - 1) * (args.d_steps + 1)  # of the batches of this iteration
        for step in range(args.d_steps):
            x_real = batches[first + step]
            with amp:
                with torch.no_grad():
                    x_fake = G(noise())
                d_loss, divergence, lipschitz = discriminator_loss(D, x_real, x_fake, args)
            update(opt_D, d_loss)

        D.requires_grad_(False)  # only the generator learns here
        x_real = batches[first + args.d_steps]
        with amp:
            g_loss = generator_loss(D, x_real, G(noise()), args)
        update(opt_G, g_loss)
        D.requires_grad_(True)
        if args.ema:
            share = (1 - args.ema) / (1 - args.ema**it)  # as in Adam: initial weights have no part
            with torch.no_grad():
                torch._foreach_lerp_(list(shown.parameters()), list(G.parameters()), share)

        stop_now = bool(stopping)
        if WORLD > 1:  # all stop together; one more wait beside those of SyncBatchNorm
            votes = torch.tensor(float(stop_now), device=device)
            dist.all_reduce(votes)
            stop_now = votes.item() > 0
        sample_now = due(args.sample_every)
        fid_now = due(args.fid_every)
        save_now = due(args.save_every) or it == start + 1 or stop_now
        show_now = sample_now or fid_now or save_now
        log_now = due(args.log_every) or fid_now or stop_now
        if not (log_now or show_now):
            continue  # nothing above waits for the device, everything below does

        losses = torch.stack([d_loss, g_loss, divergence, lipschitz])
        if not all(tensor.isfinite().all() for tensor in (losses, *G.parameters())):
            stop(f"iteration {it}: the loss or the generator is not finite; try a lower --lr (the last good "
                 f"state, if any was saved, is in {out / 'last.pt'})")
        if args.ema and show_now:  # the statistics of averaged weights are not the average of statistics
            update_bn(fixed_z[:2048].split(32), shown)
        if RANK == 0:
            if it == start + 1:  # not before: a run that fails at once can be started anew
                (out / "samples").mkdir(parents=True, exist_ok=True)
                save_grid(pick(images, columns**2), out / "real.png", columns)
                machine = {"python": platform.python_version(), "torch": torch.__version__,
                           "torchvision": version("torchvision"), "device_name": device_name}
                (out / "args.json").write_text(json.dumps({**vars(args), **machine}, indent=1))
                (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
            if log_now:
                d, g, div, ratio = losses.tolist()
                row = {"iter": it, "d_loss": d, "g_loss": g, "divergence": div, "lipschitz": ratio}
                row["sec"] = round(time.perf_counter() - began, 3)
                pace = max(0.001, row["sec"] - last["sec"]) / (it - last["iter"])
                row["img_per_sec"] = round(args.d_steps * args.batch_size / pace, 1)
                last = row
                if fid_now:
                    drawn = (generate(shown, z) for z in fixed_z[:args.fid_samples].split(50))
                    row["fid"] = frechet_distance(*drawn_stats(drawn, inception), *real_stats)
                log.append(row)
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                line = "  ".join(f"{name} {value:.6g}" for name, value in row.items())
                left = timedelta(seconds=round((args.iters - it) * pace))
                print(line.replace("lipschitz", "|delta|/d"), f" left {left}", flush=True)
            if sample_now:
                save_grid(generate(shown, fixed_z[:columns**2]), out / f"samples/{it:06d}.png", columns)
            if fid_now and row["fid"] == min(old["fid"] for old in log if "fid" in old):
                save("best.pt")
            if save_now:
                save("last.pt")
        if stop_now:
            break

    if RANK == 0 and it < args.iters:
        print(f"stopped and saved at iteration {it}; to go on, give the same command with --resume")
    elif RANK == 0:
        save_gif(out / "samples", out / "progress.gif")
        print(f"done: pictures in {out / 'samples'} and {out / 'progress.gif'}, weights in {out / 'last.pt'}")
    if WORLD > 1:
        dist.destroy_process_group()

# ---------------------------------------------------------------- sampling
def sample(args):
    """Draw from the generator in args.sample into args.out: a grid.png, or a folder of single images."""
    out = Path(args.out)
    if out.is_file() or any(out.glob("*.png")):
        stop(f"--out {out} is there already; name a new file or folder")
    checkpoint = load_checkpoint(args.sample)
    flags = checkpoint["args"]
    G = Generator(flags["img_size"], flags["z_dim"], flags["max_channels"])
    G.load_state_dict(checkpoint["shown"])
    G.to(args.device, memory_format=torch.channels_last)
    torch.manual_seed(args.seed)
    z, goal = torch.randn(2, args.num_samples, flags["z_dim"])
    if args.interpolate:  # a quarter turn from one noise to the other; each point of it is as normal as they
        angle = torch.linspace(0, math.pi / 2, 8)[:, None]
        z = (angle.cos() * z[:, None] + angle.sin() * goal[:, None]).flatten(0, 1)[:args.num_samples]
    if out.suffix == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        save_grid(generate(G, z.to(args.device)), out, 8 if args.interpolate else math.ceil(len(z) ** 0.5))
    else:
        out.mkdir(parents=True, exist_ok=True)
        for i, one in enumerate(z.split(1)):
            save_grid(generate(G, one.to(args.device)), out / f"{i:05d}.png", 1)
    print(f"{len(z)} images in {out}")

if __name__ == "__main__":
    options = parse_args()
    try:
        sample(options) if options.sample else train(options)
    except (OSError, KeyboardInterrupt) as error:  # say a full disk, or Ctrl-C while images are prepared
        stop(str(error) or "interrupted")
    except (RuntimeError, MemoryError) as error:
        if "allocate" not in str(error):
            raise
        stop("out of memory; try a smaller --batch-size, --max-channels or --img-size, or --precision bf16")
