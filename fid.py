"""FID, the Frechet Inception Distance, as people report it: a library of a few functions, and a command.

    python fid.py real/ generated/               one number; each a folder, .zip, .npy (uint8 NHWC) or .npz
    python fid.py real/ --save-stats real.npz    statistics for later, interchangeable with pytorch-fid's
    python fid.py real/ generated/ --clean       resize as clean-fid does

The network is the 2015 Inception of the FID papers with the weights that pytorch-fid publishes, in full fp32.
Heusel et al., arXiv 1706.08500; --clean: Parmar et al., arXiv 2104.11222.
Stands alone: needs torch, torchvision, numpy, scipy and Pillow.
"""
import argparse, glob, hashlib, io, itertools, os, re, sys, time, urllib.error, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
DIM = 2048  # of the features

# ---------------------------------------------------------------- the distance
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), squared, between two Gaussians.

    mu: (D,), sigma: (D, D) symmetric positive semi-definite; computed in float64. With sigma1 = R R^T the
    product has the eigenvalues of the symmetric R^T sigma2 R, so the trace needs no matrix square root, is
    right for singular covariances and never complex. Returns a float, not negative. Raises ValueError for
    shapes that do not match and for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        shapes = f"{mu1.shape}, {sigma1.shape} against {mu2.shape}, {sigma2.shape}"
        raise ValueError(f"statistics do not match: {shapes}")
    values, vectors = scipy.linalg.eigh(sigma1, driver="evd")
    root = vectors * np.sqrt(values.clip(0))
    trace = np.sqrt(scipy.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()
    return max(0.0, float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace))

class FeatureStats:
    """Mean and covariance of features that come batch by batch: count, sum and outer product, in float64.

    Memory does not grow with the number of features, and merging is exact.
    """
    def __init__(self, dim=DIM):
        self.n = 0
        self.total = np.zeros(dim)
        self.outer = np.zeros((dim, dim))

    def update(self, features):
        """features: (B, dim), a tensor or an array."""
        features = torch.as_tensor(features).detach().cpu().double().numpy()
        self.n += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other):
        """Add all that `other`, a FeatureStats too, has seen."""
        self.n += other.n
        self.total += other.total
        self.outer += other.outer

    @property
    def mean(self):
        return self.total / self.n

    @property
    def cov(self):
        """Unbiased covariance (dim, dim). Raises ValueError with fewer than two features."""
        if self.n < 2:
            raise ValueError("statistics need at least two images")
        return (self.outer - np.outer(self.mean, self.total)) / (self.n - 1)

# ---------------------------------------------------------------- the network
def leave_out_padding(_, inputs):
    """Before `branch_pool`: turn an average over 3x3 that counts the zero padding into one that does not."""
    return inputs[0] / F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, stride=1, padding=1)

class Inception(nn.Module):
    """The 2015 Inception: uint8 (B, 3, H, W) of any size -> features (B, 2048), float32.

    It differs from torchvision's in two things: its average pooling does not count the padding, and its last
    block pools by the maximum, not the average. Images are resized to 299 x 299, bilinear as in pytorch-fid,
    or with clean=True by the antialiased bicubic filter of Pillow as in clean-fid.
    """
    def __init__(self, state):
        super().__init__()
        from torchvision.models.inception import BasicConv2d, InceptionE, inception_v3  # slow to import

        class LastBlock(InceptionE):
            def _forward(self, x):
                *others, _ = super()._forward(x)
                return [*others, self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]

        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.Mixed_7c = LastBlock(2048)
        missing, unexpected = net.load_state_dict(state, strict=False)
        wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
        if wrong:
            raise ValueError(f"parameter {wrong[0]} is {'not in the network' if unexpected else 'missing'}")
        for name, module in net.eval().named_modules():
            if name.endswith("branch_pool") and not name.startswith("Mixed_7c"):
                module.register_forward_pre_hook(leave_out_padding)
            if isinstance(module, BasicConv2d):  # the same function in one pass over memory less
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        net.fc = nn.Identity()
        self.digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in state.values())).hexdigest()[:16]
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

    def device(self):
        return next(self.net.parameters()).device

    @torch.no_grad()
    def forward(self, images, clean=False):
        full = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with full, torch.autocast(images.device.type, enabled=False):
            if clean:
                x = (clean_resize(images) - 128) / 128
            else:
                x = F.interpolate(images.float(), (299, 299), mode="bilinear") / 127.5 - 1
            return self.net(x.contiguous(memory_format=torch.channels_last))

def clean_resize(images):
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [0, 255], by Pillow's bicubic, as in clean-fid."""
    images = F.interpolate(images.float(), (299, 299), mode="bicubic", antialias=True)
    return images.clamp(0, 255)

def load_inception(weights=None, device="cpu"):
    """The Inception network for FID, in evaluation mode on `device`.

    weights: a file with pytorch-fid's parameter names; None downloads the published one, once.
    Raises ValueError, in one line that says what to do, where the weights cannot be had or do not fit.
    """
    hint = f"get {WEIGHTS_URL} and name the file with --weights (--fid-weights in training)"
    try:
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            fetch = torch.hub.load_state_dict_from_url
            state = fetch(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
        inception = Inception(state)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise ValueError(f"the Inception weights could not be downloaded ({error}); {hint}") from error
    except Exception as error:  # no such file, torn, other weights, or a pickle that is more than weights
        source = weights or "the download"
        raise ValueError(f"{source} does not fit the network ({first_line(error)}); {hint}") from error
    return inception.to(device)

def say(line):
    print(line, file=sys.stderr, flush=True)

def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

# ---------------------------------------------------------------- sets of images
def open_images(path):
    """A folder, .zip or .npy -> (names, function of a name that returns a uint8 (H, W, 3) array)."""
    if path.suffix == ".npy":
        images = np.load(path, mmap_mode="r")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"{path} holds {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
        return range(len(images)), images.__getitem__
    if path.is_dir():
        names = glob.glob("**/*", root_dir=path, recursive=True)
        fetch = path.joinpath
    elif path.suffix.lower() == ".zip" and path.is_file():
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        fetch = lambda name: io.BytesIO(archive.read(name))
    else:
        raise ValueError(f"{path} is neither a folder, a .zip, an .npy nor an .npz file")

    def read(name):
        with Image.open(fetch(name)) as image:
            return np.asarray(image.convert("RGB"))

    hidden = re.compile(r"(^|/)(\.(?!\./)|__MACOSX/)")
    return sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not hidden.search(n)), read

def measure(path, inception, clean=False, batch_size=50):
    """A folder, .zip or .npy of images -> FeatureStats.

    Tells on standard error how fast it was and what it skipped. Raises ValueError with fewer than two images.
    """
    began = time.perf_counter()
    names, read = open_images(Path(path))
    stats = FeatureStats()
    skipped = []

    def attempt(name):
        try:
            return read(name)
        except Exception as error:  # Pillow raises nearly every kind of error for bad files
            skipped.append(f"  skipped {name!a}: {first_line(error)}")

    with ThreadPoolExecutor() as pool:
        ahead = pool.map(attempt, names[:batch_size])
        for i in range(batch_size, len(names) + batch_size, batch_size):
            batch = [image for image in ahead if image is not None]
            ahead = pool.map(attempt, names[i:i + batch_size])  # decoded while this batch is measured
            for _, same in itertools.groupby(batch, key=np.shape):  # each at the size it has
                images = torch.from_numpy(np.stack(list(same))).permute(0, 3, 1, 2)
                stats.update(inception(images.to(inception.device()), clean))
            if sys.stderr.isatty():
                print(f"\r{path}: {stats.n:,}/{len(names):,}", end="\r", file=sys.stderr, flush=True)
    say(f"{path}: {stats.n:,} images, {stats.n / (time.perf_counter() - began):.1f} img/s")
    for line in skipped[:5]:
        say(line)
    if stats.n < 2:
        raise ValueError(f"{path} holds {stats.n} readable images; statistics need at least two")
    return stats

def array_stats(images, inception):
    """uint8 (N, H, W, 3) memory map -> (mu, sigma), kept in a file beside it for the next time."""
    cache = Path(f"{Path(images.filename).with_suffix('')}-{inception.digest}.npz")
    if not cache.exists():
        save_stats(measure(images.filename, inception), cache)
    return load_stats(cache)

def drawn_stats(batches, inception):
    """Batches of uint8 images (B, H, W, 3), say of a generator -> (mu, sigma)."""
    stats = FeatureStats()
    for images in batches:
        stats.update(inception(images.permute(0, 3, 1, 2)))
    return stats.mean, stats.cov

def load_stats(path):
    """What `save_stats` or pytorch-fid wrote -> (mu, sigma)."""
    with np.load(path) as file:
        return file["mu"], file["sigma"]

def save_stats(stats, path):
    """Write mean and covariance as pytorch-fid does, arrays mu and sigma; beside first, then renamed."""
    partial = Path(f"{path}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, mu=stats.mean, sigma=stats.cov)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

# ---------------------------------------------------------------- command line
def parse_args():
    parser = argparse.ArgumentParser(description="Frechet Inception Distance between two sets of images.")
    parser.error = stop
    flag = parser.add_argument
    flag("sets", nargs="+", metavar="SET", help="a folder, .zip or .npy of images, or an .npz of statistics")
    flag("--save-stats", metavar="NPZ", help="write mean and covariance of the only SET to this new file")
    flag("--clean", action="store_true", help="resize as clean-fid does")
    flag("--weights", help="file of Inception weights (the published ones, downloaded once)")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args()
    if len(args.sets) != (1 if args.save_stats else 2):
        stop("give two sets to compare, or one set and --save-stats FILE.npz")
    if args.save_stats and Path(args.save_stats).exists():
        stop(f"--save-stats {args.save_stats} exists; name a new file")
    for path in args.sets:
        if not Path(path).exists():
            stop(f"{path} does not exist; name a folder, .zip, .npy or .npz")
    try:
        torch.zeros(1, device=args.device)
    except Exception as error:
        stop(f"--device {args.device} is not available ({first_line(error)}); try --device cpu")
    return args

def stop(message):
    """End with one line and exit code 2."""
    say(f"fid.py: {message}")
    sys.exit(2)

def main(args):
    results = []
    if not all(path.endswith(".npz") for path in args.sets):
        inception = load_inception(args.weights, args.device)
    for path in args.sets:
        if path.endswith(".npz"):
            results.append(load_stats(path))
            continue
        stats = measure(path, inception, args.clean)
        results.append((stats.mean, stats.cov))
        if stats.n < DIM:  # the covariance is singular and the FID mostly bias
            say(f"warning: {path} has only {stats.n:,} images; a FID from fewer than {DIM:,} is not reliable")
    if args.save_stats:
        save_stats(stats, args.save_stats)
    else:
        print(f"{frechet_distance(*results[0], *results[1]):.6f}")

if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        stop(first_line(error))
