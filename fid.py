"""FID, the Frechet Inception Distance, as people report it: a few functions, and a command.

    python fid.py real/ generated/               print one number
    python fid.py real/ --save-stats real.npz    keep statistics, interchangeable with pytorch-fid's
    python fid.py real.npz generated/            use them
    python fid.py real/ generated/ --clean       resize as clean-fid does
    python fid.py real/ generated/ --swd         the sliced Wasserstein distance: needs no weights

A set of images is a folder, a .zip, or an .npy array, uint8 (N, H, W, 3), as data.py prepares it.
The network is the 2015 Inception of the FID papers with the weights that pytorch-fid publishes.
Heusel et al., arXiv 1706.08500; --clean: Parmar et al., arXiv 2104.11222; --swd: Karras et al.,
arXiv 1710.10196, section 5.
This file stands alone: it needs torch, torchvision, numpy, scipy and Pillow.
"""

import argparse
import io
import os
import secrets
import sys
import zipfile
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.inception import inception_v3

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
ImageSet = namedtuple("ImageSet", "path names read")  # read(i): image i, uint8 (H, W, 3)


# ---------------------------------------------------------------------------------- the distance
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), between two Gaussians.

    mu: (D,), sigma: (D, D), symmetric and positive semi-definite. Returns a float, not negative,
    computed in float64. Raises ValueError for shapes that differ.

    With sigma1 = R R^T, the product sigma1 sigma2 has the eigenvalues of the symmetric matrix
    R^T sigma2 R. So the trace needs no matrix square root, is right for singular covariances too,
    and is never complex.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (mu1.size, mu1.size):
        raise ValueError(f"statistics do not match: means {mu1.shape} and {mu2.shape}")
    values, vectors = scipy.linalg.eigh(sigma1, driver="evd")
    root = vectors * np.sqrt(values.clip(0))
    trace_of_root = np.sqrt(scipy.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return float(np.maximum(distance, 0))  # unlike max, it keeps NaN


class FeatureStats:
    """Mean and covariance of features that come batch by batch.

    Keeps their number n, sum and sum of outer products, in float64, whatever their number.
    """

    def __init__(self, dim=2048):
        self.n = 0
        self.total = np.zeros(dim)
        self.outer = np.zeros((dim, dim))

    def update(self, features):
        """Add features (B, dim), a tensor or an array. Raises ValueError for another shape."""
        features = torch.as_tensor(features).detach().cpu().double().numpy()
        if features.shape[1:] != self.total.shape:
            raise ValueError(f"features {features.shape} are not (B, {len(self.total)})")
        self.n += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    @property
    def mean(self):
        """Mean (dim,)."""
        return self.total / self.n

    @property
    def cov(self):
        """Unbiased covariance (dim, dim). Raises ValueError with fewer than two features."""
        if self.n < 2:
            raise ValueError(f"statistics need at least two images, not {self.n}")
        return (self.outer - np.outer(self.mean, self.total)) / (self.n - 1)


# ----------------------------------------------------------------------------------- the network
def leave_out_padding(branch_pool, inputs):
    """Turns averages over 3x3 that count the zero padding into averages that do not.

    torchvision's blocks take such an average and pass it to their `branch_pool`. Where k of the
    nine places are padding, this divides the average by (9 - k) / 9.
    """
    inside = torch.ones_like(inputs[0][:1, :1])
    return inputs[0] / F.avg_pool2d(inside, 3, stride=1, padding=1)


def take_maximum(block, inputs, output):
    """Replaces the last branch of a block by that of the maximum over 3x3, not the average."""
    last_branch = block.branch_pool(F.max_pool2d(inputs[0], 3, stride=1, padding=1))
    return torch.cat([output[:, : -last_branch.shape[1]], last_branch], 1)


class Inception(nn.Module):
    """The 2015 Inception: uint8 (B, 3, H, W) of any size -> features (B, 2048), float32.

    state: parameters under pytorch-fid's names. The network differs from torchvision's in two
    things: its averages do not count the padding, and its last block takes a maximum. Images are
    resized to 299 x 299, bilinear as in pytorch-fid, or with clean=True as in clean-fid.
    """

    def __init__(self, state):
        super().__init__()
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(state)
        for block in net.children():
            if hasattr(block, "branch_pool") and block is not net.Mixed_7c:
                block.branch_pool.register_forward_pre_hook(leave_out_padding)
        net.Mixed_7c.register_forward_hook(take_maximum)
        net.fc = nn.Identity()
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images, clean=False):
        return self.features(resize(images.to(next(self.parameters()).device), clean))

    @torch.no_grad()
    def features(self, x):
        """What `resize` returned, (B, 3, 299, 299) -> features (B, 2048)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x.contiguous(memory_format=torch.channels_last))


def resize(images, clean=False):
    """uint8 (B, 3, H, W) -> what the network takes: float32 (B, 3, 299, 299), about [-1, 1]."""
    if images.dtype != torch.uint8 or images.shape[1] != 3:
        raise ValueError(f"images {images.dtype} {tuple(images.shape)} are not uint8 (B, 3, H, W)")
    images = images.float()
    if clean:  # Pillow's bicubic filter
        images = F.interpolate(images, (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
        return (images - 128) / 128
    return F.interpolate(images, (299, 299), mode="bilinear") / 127.5 - 1


def load_inception(weights=None, device="cpu"):
    """The Inception network for FID, in evaluation mode on `device`.

    weights: a file with pytorch-fid's parameter names; None downloads the published one, once.
    Raises ValueError, in one line that says what to do, if the weights cannot be had or used.
    """
    try:
        if weights is None:
            options = {"map_location": "cpu", "check_hash": True, "weights_only": True}
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, **options)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        inception = Inception(state)
    except Exception as error:  # no network, no file, a torn one, other weights, or code in it
        reason = " ".join(str(error).split())[:200]
        advice = f"get {WEIGHTS_URL} and name the file with --weights (in training --fid-weights)"
        raise ValueError(f"no Inception weights ({reason}): {advice}") from error
    return inception.to(device)


# -------------------------------------------------------------------------------- sets of images
def list_images(path):
    """A folder, a .zip or an .npy array -> ImageSet.

    Pixels are as pytorch-fid reads them: no colour profile, orientation or transparency. Other
    files are counted on standard error. Raises an error if there are no images.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"{array.dtype} {array.shape} is not uint8 (N, H, W, 3)")
        return ImageSet(path, range(len(array)), lambda i: np.array(array[i]))
    if path.is_dir():
        path = path.resolve()  # for `walk`, which looks at the folders above
        files = ((file.relative_to(path).as_posix(), None) for file in walk(path))
    else:
        archive = zipfile.ZipFile(path)
        files = ((entry.filename, entry) for entry in archive.infolist() if not entry.is_dir())

    images = []
    others = Counter()
    for name, entry in files:
        inner = PurePosixPath(name)
        folders = set(inner.parts[:-1]) - {".."}  # which `zip -r photos.zip ../photos` writes
        hidden = inner.name.startswith(".") or any(folder[0] in ".@" for folder in folders)
        kind = "hidden" if hidden else inner.suffix.lower() or "without an extension"
        if kind in IMG_EXTENSIONS:
            images.append((name, entry))
        else:
            others[kind] += 1
    others = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common())
    if not images:
        raise ValueError(f"no images found; other files: {others or 'none'}")
    if others:
        print(f"{path}: other files, not used: {others}", file=sys.stderr)
    images.sort(key=lambda image: PurePosixPath(image[0]).parts)
    names, entries = zip(*images, strict=True)
    if path.is_dir():
        return ImageSet(path, names, lambda i: decode((path / names[i]).read_bytes()))
    return ImageSet(path, names, lambda i: decode(archive.read(entries[i])))


def walk(root):
    """Yield the paths of all files below a folder; links are followed. Raises OSError."""
    errors = []  # by default os.walk silently skips what it cannot read
    for folder, _, files in os.walk(root, followlinks=True, onerror=errors.append):
        if any(os.path.samefile(folder, above) for above in Path(folder).parents):
            raise OSError(f"{folder} is a link to a folder above it: its images would repeat")
        for file in files:
            yield Path(folder, file)
    if errors:
        raise errors[0]


def decode(content):
    with Image.open(io.BytesIO(content)) as image:
        if image.mode[0] in "IF":  # Pillow would clip 16 bits at 255
            raise ValueError("its pixels are not 8-bit: convert it")
        return np.array(image.convert("RGB"))


def read_all(images, places):
    """Yield the images at `places` of an ImageSet; name those that cannot be read."""

    def attempt(i):
        try:
            return images.read(i)
        except Exception as error:  # Pillow raises nearly every kind of error for bad files
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise OSError(f"{images.names[i]} of {images.path}: {error!r}") from error
            print(f"  skipped {images.names[i]} of {images.path}: {error!r}", file=sys.stderr)

    with ThreadPoolExecutor() as pool:
        for i in range(0, len(places), 8):  # few at once, for they may be large
            for image in pool.map(attempt, places[i : i + 8]):
                if image is not None:
                    yield image


# --------------------------------------------------------------------------- statistics of a set
def measure(images, inception, clean=False):
    """An ImageSet -> mean (2048,) and covariance (2048, 2048) of its features."""
    device = next(inception.parameters()).device
    pixels = map(torch.from_numpy, read_all(images, range(len(images.names))))
    # resized one by one: they may be large, and of different sizes
    small = (resize(image.permute(2, 0, 1)[None].to(device), clean) for image in pixels)
    stats = FeatureStats()
    while batch := list(islice(small, 50)):
        stats.update(inception.features(torch.cat(batch)))
    few = " (an FID of fewer than 2,048 is not reliable)" if stats.n < 2048 else ""
    print(f"{images.path}: {stats.n:,} images{few}", file=sys.stderr)
    return stats.mean, stats.cov  # raises ValueError for fewer than two images


def save_stats(path, mu, sigma, clean):
    """Write statistics as pytorch-fid does, and how the images were resized."""
    beside = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        np.savez(beside, mu=mu, sigma=sigma, resize="clean" if clean else "bilinear")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_stats(path, clean):
    """-> (mu, sigma). Raises ValueError for other files, and if images were resized differently."""
    zipfile.ZipFile(path).close()  # of other files np.load says how to load them unsafely
    arrays = dict(np.load(path))
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(f"it holds {list(arrays)}, not mu and sigma: use --save-stats")
    wanted = "clean" if clean else "bilinear"
    resized = str(arrays.get("resize", wanted))  # the files of pytorch-fid do not say how
    if resized != wanted:
        raise ValueError(f"its images were resized {resized}, not {wanted}: see --clean")
    return arrays["mu"], arrays["sigma"]


# ------------------------------------------------------------------- sliced Wasserstein distance
def blur(images, stride=1):
    """Filter each channel of (B, 3, S, S) with the 5x5 binomial kernel; the edges are mirrored."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(row, row).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, stride=stride, groups=3)


def laplacian_pyramid(images):
    """float32 (B, 3, S, S), S a power of two from 16 on -> list of levels, from S down to 16 px.

    A level is what the images lose when they are halved and enlarged again. The last level is
    the images themselves at 16 px.
    """
    levels = []
    while images.shape[-1] > 16:
        half = blur(images, stride=2)
        enlarged = torch.zeros_like(images)
        enlarged[:, :, ::2, ::2] = half
        levels.append(images - 4 * blur(enlarged))  # 4: three of four pixels were zero
        images = half
    return [*levels, images]


def cut_patches(level, generators):
    """(B, 3, S, S) -> (B, 32, 3, 7, 7), at places drawn by each image's own generator."""
    free = level.shape[-1] - 6
    places = np.stack([generator.integers(free, size=(2, 32)) for generator in generators])
    rows, columns = torch.from_numpy(places).unbind(1)
    windows = level.unfold(2, 7, 1).unfold(3, 7, 1)
    return windows[torch.arange(len(level))[:, None], :, rows, columns]


def patches_by_level(images, count):
    """`count` images, spread evenly over a set -> {level's size in px: patches (N, 32, 3, 7, 7)}.

    Raises ValueError unless all are squares of one size, a power of two from 16 px on.
    """
    readable = read_all(images, np.linspace(0, len(images.names) - 1, count).astype(int))
    shapes = set()
    levels = defaultdict(list)
    while batch := list(islice(readable, 8)):
        shapes |= {image.shape for image in batch}
        size = len(batch[0])
        if shapes != {(size, size, 3)} or size < 16 or size & (size - 1):
            reason = "--swd needs squares of one size, a power of two from 16 px on"
            raise ValueError(f"{images.path}: {reason}: give the .npy that data.py makes of it")
        pixels = np.stack(batch)
        # the places follow from an image's own pixels, so the order of a set does not matter
        generators = [np.random.default_rng((0, zlib.crc32(image))) for image in pixels]
        for level in laplacian_pyramid(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()):
            levels[level.shape[-1]].append(cut_patches(level, generators))
    if sum(map(len, levels[16])) < count:
        raise ValueError(f"{images.path}: some images cannot be read: remove them for --swd")
    print(f"{images.path}: {count:,} of {len(images.names):,} images", file=sys.stderr)
    return {size: torch.cat(patches) for size, patches in levels.items()}


def normalise_channels(patches):
    """(N, P, 3, h, w) -> points (N P, 3 h w), each channel with mean 0 and deviation 1."""
    deviation, mean = torch.std_mean(patches, (0, 1, 3, 4), keepdim=True)
    deviation = deviation.clamp_min(1e-3)  # of 255: do not divide the rounding of a blank level
    return ((patches - mean) / deviation).flatten(2).flatten(0, 1).numpy()


def sliced_wasserstein(a, b, directions=256):
    """Two arrays of points (N, D) -> their Wasserstein-1 distance along a line, a float.

    It is the mean over lines of random directions. On a line, sorting pairs the points.
    """
    lines = np.random.default_rng(0).standard_normal((directions, a.shape[1]), a.dtype)
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    total = 0.0
    for some in np.split(lines, range(16, directions, 16)):  # all would take much memory
        gaps = np.abs(np.sort(some @ a.T) - np.sort(some @ b.T))
        total += gaps.mean(axis=1, dtype=np.float64).sum()
    return float(total / directions)


def compare_by_level(first, second):
    """Two ImageSets -> {level's size in px: sliced Wasserstein distance x 1,000}.

    Compares up to 4,096 images of each, spread evenly over the set, by 32 patches of 7x7 of each
    image and level. Takes about 80 MB of memory for each set and level.
    """
    count = min(len(first.names), len(second.names), 4096)
    if count < 128:
        raise ValueError(f"--swd needs 128 images in each set, not {count}")
    levels = [patches_by_level(images, count) for images in (first, second)]
    if levels[0].keys() != levels[1].keys():
        raise ValueError(f"--swd: sizes {max(levels[0])} and {max(levels[1])} differ: see data.py")
    distances = {}
    for size in levels[0]:
        a, b = (normalise_channels(level[size]) for level in levels)
        distances[size] = 1000 * sliced_wasserstein(a, b)
    return distances


# ---------------------------------------------------------------------------------- command line
def compare(args):
    """Print the distance of two sets, or save the statistics of one."""
    target = args.save_stats
    if len(args.sets) != (1 if target else 2):
        raise ValueError(f"give two sets, or one and --save-stats FILE.npz, not {len(args.sets)}")
    if target and (target.suffix != ".npz" or not os.access(target.parent, os.W_OK)):
        raise ValueError(f"--save-stats {target}: name an .npz file in a folder that exists")
    if args.swd and (target or any(path.suffix.lower() == ".npz" for path in args.sets)):
        raise ValueError("--swd needs two sets of images, not statistics")
    sets = []
    for path in args.sets:  # all of them, before the first is measured
        try:
            is_stats = path.suffix.lower() == ".npz"
            sets.append(load_stats(path, args.clean) if is_stats else list_images(path))
        except Exception as error:  # which one depends on the damage
            raise ValueError(f"{path} isn't a valid folder, .zip, .npy or .npz: {error}") from error
    if args.swd:
        distances = compare_by_level(*sets)
        for size, distance in distances.items():
            print(f"{size} {distance:.3f}")
        print(f"mean {np.mean(list(distances.values())):.3f}")
        return
    for i, images in enumerate(sets):
        if isinstance(images, ImageSet):
            sets[i] = measure(images, load_inception(args.weights, args.device), args.clean)
    if target:
        save_stats(target, *sets[0], args.clean)
    else:
        print(f"{frechet_distance(*sets[0], *sets[1]):.6f}")


def main():
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(
        description="Compare two sets of images: the Frechet Inception Distance.",
        epilog="Pixels are read as by pytorch-fid; for those of a run, name the .npy of data.py.",
    )
    flag = parser.add_argument
    flag("sets", nargs="+", type=Path, metavar="SET", help="folder, .zip, .npy or .npz")
    flag("--save-stats", type=Path, metavar="NPZ", help="write the statistics of the only SET")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--clean", action="store_true", help="resize images as clean-fid does")
    either("--swd", action="store_true", help="sliced Wasserstein distance x 1,000, by level")
    flag("--weights", help="file of Inception weights (downloaded)")
    flag("--device", choices=devices, default=devices[0], help="cuda if torch finds a GPU")
    try:
        compare(parser.parse_args())
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
