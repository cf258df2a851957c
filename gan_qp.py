"""GAN-QP in one file: a quadratic potential in the dual space, no Lipschitz constraint, no vanishing gradient.

    discriminator   max over T of  E[ delta - delta^2 / (2 lambda d(x_r, x_f)) ],  delta = T(x_r) - T(x_f)
    generator       min over G of  E[ delta ]

d is the distance of a real image to the generated one that it is paired with; lambda = 10.

    python gan_qp.py --img-size 128 --data photos/       a folder or .zip; without --data, drawn faces
    python gan_qp.py --sample runs/gan_qp-128/last.pt --out grid.png

Jianlin Su, "GAN-QP: A Novel GAN Framework without Gradient Vanishing and Lipschitz Constraint", arXiv 1811.07296.
"""
import argparse, json, math, os, platform, shlex, signal, sys, time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before any process group: imported later, it would keep one, and its threads, alive at exit
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import CACHE_DIR, Batches, load_images, number, replacing, save_gif, save_grid
from fid import array_stats, drawn_stats, frechet_distance, load_inception

SCRIPT = Path(__file__).stem
SIZES = [16, 32, 64, 128, 256, 512, 1024]

# ---------------------------------------------------------------- networks

def layer_widths(img_size, max_channels=None):
    """Channels of the log2(size) - 2 hidden layers, narrow to wide: the widest has 8 * size, 2048 at most."""
    n, widest = int(math.log2(img_size)) - 3, min(8 * img_size, max_channels or 2048)
    if img_size not in SIZES or widest < 2 ** n:
        raise ValueError(f"img_size {img_size} must be one of {SIZES}, and max_channels (--max-channels) {2 ** max(n, 1)} or more for it")
    return [widest >> i for i in range(n, -1, -1)]

def glorot(module):
    """Glorot uniform weights and zero biases: Keras' defaults, which the paper trained with."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        for p in module.parameters():
            nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)

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
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 5, stride=2, padding=2, output_padding=1))
        self.apply(glorot)

    def forward(self, z):
        x = F.relu(self.norm(self.linear(z)))
        x = x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # channels last without a copy
        return torch.tanh(self.layers(x).to(z.dtype))

class Discriminator(nn.Module):
    """Images (B, 3, img_size, img_size) in [-1, 1], with pairwise=True two such -> raw scores (B,), float32."""
    def __init__(self, img_size, max_channels=None, pairwise=False):
        super().__init__()
        widths, layers = layer_widths(img_size, max_channels), []
        for before, width in zip([6 if pairwise else 3, *widths], widths):
            layers.append(nn.Conv2d(before, width, 5, stride=2, padding=2, bias=False))
            if len(layers) > 1:  # on all but the first
                layers.append(nn.BatchNorm2d(width, eps=1e-3, momentum=0.01))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers, self.linear = nn.Sequential(*layers), nn.Linear(16 * widths[-1], 1, bias=False)
        self.apply(glorot)

    def forward(self, x, y=None):
        features = self.layers(x if y is None else torch.cat([x, y], 1)).permute(0, 2, 3, 1).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # a difference of scores needs all their digits
            return self.linear(features.to(x.dtype)).squeeze(1)

# ---------------------------------------------------------------- losses

def pair_distance(x_real, x_fake, metric="l1"):
    """Distance of each pair, over pixels and channels: mean absolute, or "l2" root mean square. (B, ...), (B, ...) -> (B,)"""
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
    """-> loss to minimise: the mean of delta, or what of it depends on the generator"""
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
    if dist.is_initialized():  # not DistributedDataParallel: it does not see the gradient within a gradient penalty
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        flat = torch.cat([grad.flatten() for grad in grads]) / dist.get_world_size()
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view(grad.shape))
    optimizer.step()

@torch.no_grad()
def generate(G, z):
    """Noise (N, z_dim) -> uint8 images (N, 3, S, S), in evaluation mode and fp32, rounded."""
    G.eval()  # .forward: not the compiled one
    images = torch.cat([((G.forward(part) + 1) * 127.5).round().byte() for part in z.split(32)])
    G.train()
    return images

def load_checkpoint(path):
    """-> (what `train` saved, its generator for sampling); anything else is refused, and no code in it run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        flags, reason = checkpoint["args"], f"of {checkpoint['script']}.py"
        if checkpoint["script"] == SCRIPT:
            G = Generator(flags["img_size"], flags["z_dim"], flags["max_channels"])
            G.load_state_dict(checkpoint["shown"])
            return checkpoint, G
    except Exception as error:
        reason = type(error).__name__  # torch's own text is many lines
    stop(f"{path} is not a whole checkpoint of {SCRIPT}.py ({reason}); name another")

# ---------------------------------------------------------------- training

def train(args):
    """Train, or go on from last.pt, up to iteration args.iters or a signal; all that comes of it is in args.out."""
    device, out = torch.device(args.device), Path(args.out)
    if dist.is_torchelastic_launched():  # by torchrun: one process for each GPU
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.batch_size % world or args.batch_size < 2 * world:
        stop(f"--batch-size {args.batch_size} must divide among {world} processes, two images or more for each")
    checkpoint = load_checkpoint(out / "last.pt")[0] if args.resume else {"iter": 0, "log": [], "args": {}}
    it, log = checkpoint["iter"], checkpoint["log"]
    for name in sorted(checkpoint["args"].keys() - MAY_CHANGE):
        flag, old, new = "--" + name.replace("_", "-"), checkpoint["args"][name], vars(args).get(name)
        if old != new:
            stop(f"{flag} {new} contradicts the run in {out}, which has {flag} {old}")
    try:
        layer_widths(args.img_size, args.max_channels)
        inception = load_inception(args.fid_weights, device) if args.fid_every else None
        images = load_images(args.data, args.img_size, args.cache_dir, quiet=rank > 0)
        real_stats = array_stats(images, inception) if inception else None
    except ValueError as error:
        stop(error)

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type != "mps" and fast
    batches = Batches(images, args.batch_size, device, args.seed, args.flip, rank, world)
    reals = args.d_steps + args.pairwise  # batches of real images in an iteration
    torch.manual_seed(args.seed)
    G = Generator(args.img_size, args.z_dim, args.max_channels)
    D = Discriminator(args.img_size, args.max_channels, args.pairwise)
    fixed_z = torch.randn(max(81, args.fid_samples), args.z_dim, generator=torch.Generator().manual_seed(args.seed)).to(device)
    if device.type == "cuda" and world > 1:
        G, D = map(nn.SyncBatchNorm.convert_sync_batchnorm, (G, D))
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, args.betas, eps=1e-7, fused=device.type != "mps") for net in (G, D))
    parts = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}
    if args.ema:
        parts["ema"] = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    shown = parts["ema"].module if args.ema else G  # the generator of samples and FID
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(checkpoint[name])
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled, say without a C++ compiler, runs as it is
        G.compile(), D.compile()

    def save(name):
        states = {key: part.state_dict() for key, part in [*parts.items(), ("shown", shown)]}  # the last costs no space
        with replacing(out / name) as file:
            torch.save({"script": SCRIPT, "iter": it, "log": log, "args": vars(args), **states}, file)

    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        if not args.resume:
            save("last.pt")  # so that a run can be resumed from its very start
            save_grid(torch.from_numpy(images[::max(1, len(images) // 81)][:81].copy()).permute(0, 3, 1, 2), out / "real.png", 9)
        machine = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision"),
                   "device_name": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()}
        (out / "args.json").write_text(json.dumps({**vars(args), **machine}, indent=1))
        (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))  # cut back to the checkpoint
    history, stopping, marked, mark = [], [], it, time.perf_counter()
    began = mark - (log[-1]["sec"] if log else 0)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stopping.append(kind))

    for it in range(it + 1, args.iters + 1):
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
        if args.ema:
            parts["ema"].update_parameters(G)
        history.append(torch.stack([d_loss, g_loss, divergence, lipschitz]).detach())

        due = {name for name in ("log", "sample", "save", "fid") if (every := vars(args)[name + "_every"])
               and (it % every == 0 or it == args.iters)}
        if not due and not (stopping and world == 1):
            continue  # what follows waits for the device
        table = F.pad(torch.stack(history), (0, 1), value=len(stopping))
        if world > 1:
            dist.all_reduce(table)
        rows, history = (table / world).tolist(), []
        leave, whole = rows[-1].pop() > 0, all(p.isfinite().all() for p in G.parameters())
        for i, row in enumerate(rows, it + 1 - len(rows)):
            if not all(map(math.isfinite, row)) or i == it and not whole:
                stop(f"iteration {i}: the loss or the generator is not finite; {out / 'last.pt'} holds the last good state; try a lower --lr")
        pace = (time.perf_counter() - mark) / (it - marked)
        record = {"iter": it, **dict(zip(("d_loss", "g_loss", "divergence", "lipschitz"), rows[-1])),
                  "img_per_sec": round(args.d_steps * args.batch_size / pace, 1), "sec": round(time.perf_counter() - began, 2)}
        if "fid" in due:
            fake_stats = drawn_stats(lambda part: generate(shown, fixed_z[part]), args.fid_samples, inception)
            record["fid"] = frechet_distance(*fake_stats, *real_stats)
        if rank == 0 and (leave or due & {"log", "fid"}):
            log.append(record)
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            line = "  ".join(f"{name} {value:.5g}" for name, value in record.items() if name != "sec").replace("lipschitz", "|delta|/d")
            line += f"  left {timedelta(seconds=round((args.iters - it) * pace))}"
            print(f"\r{line}\033[K" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)
        if rank == 0 and "sample" in due:
            save_grid(generate(shown, fixed_z[:81]), out / "samples" / f"{it:06d}.png", 9)
        if rank == 0 and "fid" in due and record["fid"] == min(row["fid"] for row in log if "fid" in row):
            save("best.pt")
        if rank == 0 and (leave or "save" in due):
            save("last.pt")
        if leave:
            break
        marked, mark = it, time.perf_counter()
    if rank == 0 and it < args.iters:
        print(f"\nstopped and saved at iteration {it}; go on with:", shlex.join(["python", *sys.argv, *["--resume"] * (not args.resume)]))
    elif rank == 0:
        save_gif(out / "samples", out / "progress.gif")
        print(f"\ndone: pictures in {out / 'samples'} and {out / 'progress.gif'}, weights in {out / 'last.pt'}")
    if world > 1:
        dist.destroy_process_group()

def slerp(a, b, steps):
    """Spherical interpolation from noise a to noise b, each (N, z_dim) -> (N * steps, z_dim)."""
    angle, t = F.cosine_similarity(a, b).acos()[:, None, None], torch.linspace(0, 1, steps)[:, None]
    return ((torch.sin((1 - t) * angle) * a[:, None] + torch.sin(t * angle) * b[:, None]) / torch.sin(angle)).flatten(0, 1)

def sample(args):
    """Draw from the generator in args.sample into args.out, a .png for a grid or else a folder of single images."""
    G, out = load_checkpoint(args.sample)[1].to(args.device, memory_format=torch.channels_last), Path(args.out)
    z = torch.randn(2, args.num_samples, G.linear.in_features, generator=torch.Generator().manual_seed(args.seed))
    z = slerp(*z, 8)[:args.num_samples] if args.interpolate else z[0]
    (out.parent if out.suffix == ".png" else out).mkdir(parents=True, exist_ok=True)
    for i, part in enumerate([z] if out.suffix == ".png" else z.split(1)):
        path, columns = out if out.suffix == ".png" else out / f"{i:05d}.png", 8 if args.interpolate else math.ceil(len(part) ** 0.5)
        save_grid(generate(G, part.to(args.device)), path, columns)
    print(f"{len(z)} images in {out}")

# ---------------------------------------------------------------- command line

MAY_CHANGE = {"iters", "device", "precision", "compile", "out", "resume", "log_every", "sample_every", "save_every", "fid_every",
              "fid_samples", "fid_weights", "cache_dir", "sample", "num_samples", "interpolate"}  # when a run is resumed

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag, count = stop, parser.add_argument, number(int, 1, 10 ** 9)
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
    flag("--max-channels", type=number(int, 2, 10 ** 5), default=2048, help="of the widest layer at most (2048)")
    flag("--ema", type=number(float, 0, 0.999999), default=0.0, help="decay of an average of the generator, for samples and FID (0: off)")
    flag("--flip", action="store_true", help="random horizontal flips")
    flag("--seed", type=number(int, 0, 2 ** 31), default=0, help="of everything random (0)")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    flag("--device", default=device, help="cuda, mps or cpu (the first of them that is there)")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: autocast, losses in fp32 (auto: where the hardware has it)")
    flag("--compile", action="store_true", help="torch.compile the networks, as far as it applies")
    flag("--out", help=f"the run's folder (runs/{SCRIPT}-<size>); with --sample a .png for a grid, or a folder")
    flag("--resume", action="store_true", help="go on from last.pt in --out")
    for what, every in (("log", 50), ("sample", 500), ("save", 1000), ("fid", 0)):
        flag(f"--{what}-every", type=number(int, min(every, 1), 10 ** 9), default=every, help=f"iterations ({every or '0: never'})")
    flag("--fid-samples", type=number(int, 2, 10 ** 7), default=10000, help="generated images for the FID (10000)")
    flag("--fid-weights", help="file of Inception weights (the published ones, downloaded once)")
    flag("--cache-dir", default=CACHE_DIR, help=f"for prepared data and statistics ({CACHE_DIR})")
    flag("--sample", metavar="CKPT", help="no training: draw images from this checkpoint, with --seed, into --out")
    flag("--num-samples", type=count, default=64, help="how many (64)")
    flag("--interpolate", action="store_true", help="rows of 8 on the sphere, from one noise to another")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (64 if args.img_size < 512 else 32)
    if dist.is_torchelastic_launched() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" is this one from now on
    args.out = args.out or (f"{args.sample}-seed{args.seed}.png" if args.sample else f"runs/{SCRIPT}-{args.img_size}")
    try:
        torch.zeros(1, device=args.device)
    except Exception as error:
        stop(f"--device {args.device} is not to be had here ({str(error).splitlines()[0]}); try --device cpu")
    out = Path(args.out)
    held = [f for f in ("last.pt", "best.pt", "log.jsonl", "args.json", "real.png", "samples", "progress.gif") if (out / f).exists()]
    if args.sample and (out.is_file() or any(out.glob("*.png"))):
        stop(f"--out {out} is there already; name a new file or folder")
    if args.resume and "last.pt" not in held:
        stop(f"--resume: there is no last.pt in --out {out}; name the folder of a run, or start one without --resume")
    if held and not args.resume and not args.sample:
        stop(f"--out {out} already holds {held[0]} of a run; go on with it by --resume, or name another folder")
    return args

if __name__ == "__main__":
    options = parse_args()
    try:
        sample(options) if options.sample else train(options)
    except (OSError, KeyboardInterrupt) as error:  # say a full disk, or Ctrl-C while images are prepared
        stop(str(error) or "interrupted")
