"""FID, the Frechet Inception Distance, as people report it: a few functions, and a command.

    python fid.py real/ generated/               print one number
    python fid.py real/ --save-stats real.npz    keep statistics, interchangeable with pytorch-fid's
    python fid.py real.npz generated/            use them
    python fid.py real/ generated/ --clean       resize as clean-fid does
    python fid.py real/ generated/ --swd         the sliced Wasserstein distance: needs no weights

A set of images is a folder, a .zip, or an .npy array, uint8 (N, H, W, 3), as data.py prepares it.
The network is the 2015 Inception of the FID papers with the weights that pytorch-fid publishes,
always in full float32. Heusel et al., arXiv 1706.08500; --clean: Parmar et al., arXiv 2104.11222;
--swd: Karras et al., arXiv 1710.10196, section 5.
This file stands alone: it needs torch, torchvision, numpy, scipy and Pillow.
"""
import argparse
import contextlib
import hashlib
import http.client
import io
import os
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d"  # the first digits, which the file's name ends with
FEATURES = 2048  # length of a feature vector
SWD_IMAGES = 4096  # compare at most this many of each set
SWD_FEWEST = 128


def say(line):
    print(line, file=sys.stderr, flush=True)


def one_line(error):
    """What an exception says, as one line."""
    words = str(error).split() or [type(error).__name__]
    return " ".join(words)[:300]


# ---------------------------------------------------------------- the distance


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), between two Gaussians.

    mu: (D,), sigma: (D, D), symmetric and positive semi-definite. Returns a float, not negative,
    computed in float64. Raises ValueError for shapes that do not match and for values that are
    not finite.

    With sigma1 = R R^T, the product sigma1 sigma2 has the eigenvalues of the symmetric matrix
    R^T sigma2 R. So the trace needs no matrix square root, is right for singular covariances too,
    and is never complex.
    """
    statistics = [np.asarray(values, dtype=np.float64) for values in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = statistics
    square = (mu1.size, mu1.size)
    if mu1.ndim != 1 or mu1.shape != mu2.shape or {sigma1.shape, sigma2.shape} != {square}:
        first = f"{mu1.shape} and {sigma1.shape}"
        second = f"{mu2.shape} and {sigma2.shape}"
        raise ValueError(f"statistics do not match: shapes {first} against {second}")
    if not all(np.isfinite(values).all() for values in statistics):
        raise ValueError("statistics are not finite: they hold NaN or infinity")

    values, vectors = scipy.linalg.eigh(sigma1, driver="evd")
    root = vectors * np.sqrt(values.clip(0))
    trace_of_root = np.sqrt(scipy.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()

    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(0.0, float(distance))


class FeatureStats:
    """Mean and covariance of features that come batch by batch.

    Keeps their number, sum and sum of outer products, in float64: memory does not grow with the
    number of features, and merging is exact.
    """

    def __init__(self, dim=FEATURES):
        self.n = 0
        self.total = np.zeros(dim)
        self.outer = np.zeros((dim, dim))

    def update(self, features):
        """Add features (B, dim), a tensor or an array."""
        features = torch.as_tensor(features).detach().cpu().double().numpy()
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise ValueError(f"features are {features.shape}, not (B, {len(self.total)})")
        self.n += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other):
        """Add all that `other`, a FeatureStats of the same dim, has seen."""
        if len(other.total) != len(self.total):
            raise ValueError(f"features have {len(other.total)} and {len(self.total)} dimensions")
        self.n += other.n
        self.total += other.total
        self.outer += other.outer

    @property
    def mean(self):
        """Mean (dim,). Raises ValueError while there are no features."""
        if self.n < 1:
            raise ValueError("statistics need at least one image")
        return self.total / self.n

    @property
    def cov(self):
        """Unbiased covariance (dim, dim). Raises ValueError with fewer than two features."""
        if self.n < 2:
            raise ValueError("statistics need at least two images")
        return (self.outer - np.outer(self.mean, self.total)) / (self.n - 1)


# ---------------------------------------------------------------- the network


class LeaveOutPadding(nn.Module):
    """Turns averages over 3x3 that count the zero padding into averages that do not.

    torchvision's blocks average and then call `branch_pool`; this module goes in between.
    """

    def forward(self, average):
        inside = torch.ones_like(average[:1, :1])
        return average / F.avg_pool2d(inside, 3, stride=1, padding=1)


class LastBlock(nn.Module):
    """torchvision's last block, whose last branch takes the maximum over 3x3, not the average."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        largest = F.max_pool2d(x, 3, stride=1, padding=1)
        last_branch = self.block.branch_pool(largest)
        other_branches = self.block(x)[:, :-last_branch.shape[1]]
        return torch.cat([other_branches, last_branch], 1)


class Inception(nn.Module):
    """The 2015 Inception: uint8 (B, 3, H, W) of any size -> features (B, 2048), float32.

    state: parameters under pytorch-fid's names. The network differs from torchvision's in two
    things: its averages do not count the padding, and its last block takes a maximum. Images are
    resized to 299 x 299, bilinear as in pytorch-fid, or with clean=True as in clean-fid.
    """

    def __init__(self, state):
        super().__init__()
        # Imported here because it takes as long to import as torch itself.
        from torchvision.models.inception import BasicConv2d, inception_v3

        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(state)
        net.eval()

        # A convolution and its batch norm as one layer: the same function, and faster.
        for module in net.modules():
            if isinstance(module, BasicConv2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()

        for block in net.children():
            if hasattr(block, "branch_pool") and block is not net.Mixed_7c:
                block.branch_pool = nn.Sequential(LeaveOutPadding(), block.branch_pool)
        net.Mixed_7c = LastBlock(net.Mixed_7c)
        net.fc = nn.Identity()
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

        content = b"".join(tensor.numpy().tobytes() for tensor in state.values())
        self.digest = hashlib.sha256(content).hexdigest()[:16]

    def device(self):
        return next(self.net.parameters()).device

    def forward(self, images, clean=False):
        return self.features(resize(images, clean))

    @torch.no_grad()
    def features(self, x):
        """What `resize` returned, (B, 3, 299, 299) -> features (B, 2048)."""
        with full_precision(), torch.autocast(x.device.type, enabled=False):
            return self.net(x.contiguous(memory_format=torch.channels_last))


def resize(images, clean=False):
    """uint8 (B, 3, H, W) -> what the network takes: float32 (B, 3, 299, 299), about [-1, 1]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape)
        raise ValueError(f"images are {images.dtype} {shape}, not uint8 (B, 3, H, W)")
    if clean:
        return (clean_resize(images) - 128) / 128
    return F.interpolate(images.float(), (299, 299), mode="bilinear") / 127.5 - 1


def clean_resize(images):
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [0, 255], by Pillow's bicubic filter."""
    images = F.interpolate(images.float(), (299, 299), mode="bicubic", antialias=True)
    return images.clamp(0, 255)


@contextlib.contextmanager
def full_precision():
    """Keep TF32 out of cuDNN's convolutions.

    torch has a new switch for it since 2.9, and warns about the old one, which `cudnn.flags` reads.
    """
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        switch, name, off = cudnn.conv, "fp32_precision", "ieee"
    else:
        switch, name, off = cudnn, "allow_tf32", False
    before = getattr(switch, name)
    setattr(switch, name, off)
    try:
        yield
    finally:
        setattr(switch, name, before)


def published_weights():
    """Path of pytorch-fid's weights in torch.hub's folder; they are downloaded if need be.

    torch.hub checks a file only while it downloads it, so a damaged one would stay forever.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_URL.rsplit("/", 1)[1])
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest().startswith(WEIGHTS_SHA256):
            return path
        say(f"{path} is damaged; downloading it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256)
    return path


def load_inception(weights=None, device="cpu"):
    """The Inception network for FID, in evaluation mode on `device`.

    weights: a file with pytorch-fid's parameter names; None downloads the published one, once.
    Raises ValueError, in one line that says what to do, if the weights cannot be obtained or used.
    """
    hint = f"get {WEIGHTS_URL} and name the file with --weights (--fid-weights in training)"
    if weights is None:
        try:
            weights = published_weights()
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            message = f"the weights could not be downloaded ({one_line(error)}); {hint}"
            raise ValueError(message) from error
    try:
        path = Path(weights).expanduser()
        inception = Inception(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # no file, a torn one, other weights, or a pickle that runs code
        message = f"{weights} does not fit the network ({one_line(error)}); {hint}"
        raise ValueError(message) from error
    return inception.to(device)


# ---------------------------------------------------------------- sets of images


class ImageSet:
    """Images of a set, read when they are asked for.

    path: the set's, for messages. names: the images' names, for messages.
    read: function of an index -> image, uint8 (H, W, 3), at the size it has.
    """

    def __init__(self, path, names, read):
        if not names:
            raise ValueError(f"{path} holds no images")
        self.path = path
        self.names = names
        self.read = read

    def batches(self, indices=None, batch_size=50):
        """Yield lists of (name, image), decoded by threads while the caller works on the last.

        indices: which images, all of them by default. An image that cannot be read is skipped.
        Reports the speed and what was skipped on standard error.
        """
        began = time.perf_counter()
        done = 0
        skipped = []

        def attempt(index):
            try:
                return self.names[index], self.read(index)
            except Exception as error:  # Pillow raises nearly every kind of error for bad files
                skipped.append(f"  skipped {self.names[index]!a}: {one_line(error)}")

        if indices is None:
            indices = range(len(self.names))
        blocks = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
        ahead = []
        with ThreadPoolExecutor() as pool:
            # Each round starts to decode a block and yields the one that the round before started,
            # so an empty block comes last.
            for block in [*blocks, []]:
                batch = [pair for pair in ahead if pair is not None]
                ahead = pool.map(attempt, block)
                if batch:
                    yield batch
                done += len(batch)
                if sys.stderr.isatty():
                    progress = f"{self.path}: {done:,}/{len(indices):,}"
                    print(progress, end="\r", file=sys.stderr, flush=True)

        speed = done / (time.perf_counter() - began)
        say(f"{self.path}: {done:,} images, {len(skipped):,} skipped, {speed:.1f} img/s")
        for line in skipped[:5]:
            say(line)


def is_hidden(name):
    """Whether a file or one of its folders is hidden, or of those that macOS adds to archives."""
    parts = [part for part in PurePosixPath(name).parts if part != ".."]
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def list_folder(folder):
    """Names of all files below the folder, as posix paths relative to it.

    Links are followed, and a folder that can be reached in several ways is entered once.
    """
    names = []
    entered = set()

    def report(error):
        say(f"{error.filename} cannot be read: {error.strerror}")

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=report):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()  # os.walk goes no deeper here
            continue
        entered.add(real)
        folders.sort()
        base = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        names += [str(base / file) for file in files]
    return names


def choose_images(path, files, name_of=str):
    """Those of the files that have an image's extension, sorted by name; hidden ones are left out.

    Reports on standard error how many other files there are.
    """
    extensions = Image.registered_extensions()  # of all that the installed Pillow knows
    images = []
    others = Counter()
    for file in files:
        name = name_of(file)
        extension = PurePosixPath(name).suffix.lower()
        if is_hidden(name) or name.endswith("/"):  # archives name their folders too
            continue
        if extension in extensions:
            images.append(file)
        else:
            others[extension or "without an extension"] += 1

    if others:
        most_first = sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
        kinds = ", ".join(f"{count:,} {extension}" for extension, count in most_first)
        word = "file" if others.total() == 1 else "files"
        say(f"{path}: {others.total():,} other {word}: {kinds}")
    return sorted(images, key=name_of)


def decode(file):
    """Pixels as pytorch-fid reads them: no colour profile, no orientation, no transparency."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def open_folder(path):
    names = choose_images(path, list_folder(path))

    def read(index):
        file = path / names[index]
        if not file.is_file():
            raise ValueError("not a file")  # opening a named pipe would wait forever
        return decode(file)

    return ImageSet(path, names, read)


def open_zip(path):
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a valid zip archive ({one_line(error)})") from error
    # Entries are read, not names: one name may stand for several images.
    entries = choose_images(path, archive.infolist(), name_of=lambda entry: entry.filename)

    def read(index):
        return decode(io.BytesIO(archive.read(entries[index])))

    return ImageSet(path, [entry.filename for entry in entries], read)


def open_array(path):
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path} is not a valid .npy array ({one_line(error)})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{path} holds {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
    return ImageSet(path, range(len(images)), images.__getitem__)


def open_images(path):
    """A folder, a .zip or an .npy array of images -> ImageSet. Raises ValueError for others."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if path.suffix.lower() == ".zip":
        return open_zip(path)
    if path.suffix.lower() == ".npy":
        return open_array(path)
    raise ValueError(f"{path} is not a folder, .zip, .npy or .npz file")


# ---------------------------------------------------------------- statistics of a set


def measure(images, inception, clean=False):
    """ImageSet -> FeatureStats of its features. Raises ValueError with fewer than two images."""
    stats = FeatureStats()
    for batch in images.batches():
        small = []  # resized one by one: they may be large, and of different sizes
        for _, image in batch:
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            small.append(resize(image.to(inception.device()), clean))
        stats.update(inception.features(torch.cat(small)))
    if stats.n < 2:
        raise ValueError(f"{images.path} holds {stats.n} readable images; two or more are needed")
    if stats.n < FEATURES:  # the covariance is singular and the FID mostly bias
        few = f"{images.path} has only {stats.n:,} images"
        say(f"warning: {few}; an FID from fewer than {FEATURES:,} is not reliable")
    return stats


def array_stats(images, inception):
    """A memory map, uint8 (N, H, W, 3) -> (mu, sigma), kept in a file beside it for next time."""
    cache = Path(f"{Path(images.filename).with_suffix('')}-{inception.digest}.npz")
    try:
        return load_stats(cache)
    except ValueError:  # it is not there yet, or damaged
        save_stats(measure(open_images(images.filename), inception), cache)
    return load_stats(cache)


def generated_stats(batches, inception):
    """Batches of uint8 images (B, H, W, 3), say a generator's -> (mu, sigma)."""
    stats = FeatureStats()
    for images in batches:
        stats.update(inception(images.permute(0, 3, 1, 2)))
    return stats.mean, stats.cov


def load_stats(path):
    """What `save_stats` or pytorch-fid wrote -> (mu, sigma). Raises ValueError for other files."""
    hint = "write one with --save-stats"
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:  # numpy raises a different error for each kind of bad file
        reason = one_line(error)
        raise ValueError(f"{path} is not an .npz file of statistics ({reason}); {hint}") from error
    if not {"mu", "sigma"} <= arrays.keys():
        held = ", ".join(arrays) or "nothing"
        raise ValueError(f"{path} holds {held}, not the arrays mu and sigma; {hint}")
    mu = arrays["mu"]
    sigma = arrays["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        shapes = f"mu of shape {mu.shape} and sigma of shape {sigma.shape}"
        raise ValueError(f"{path} holds {shapes}, not (D,) and (D, D); {hint}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path} holds values that are not finite; {hint}")
    return mu, sigma


def save_stats(stats, path):
    """Write a FeatureStats as pytorch-fid does: arrays mu and sigma in an .npz file."""
    partial = Path(f"{path}.{os.getpid()}")  # renamed once it is whole
    try:
        with open(partial, "wb") as file:
            np.savez(file, mu=stats.mean, sigma=stats.cov)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- sliced Wasserstein distance


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


def cut_patches(level, generators, count=32, side=7):
    """(B, 3, S, S) -> (B, count, 3, side, side), at places drawn by each image's own generator."""
    free = level.shape[-1] - side + 1
    places = np.stack([generator.integers(free, size=(2, count)) for generator in generators])
    rows, columns = torch.from_numpy(places).unbind(1)
    windows = level.unfold(2, side, 1).unfold(3, side, 1)
    return windows[torch.arange(len(level))[:, None], :, rows, columns]


def normalise_channels(patches):
    """(N, P, 3, h, w) -> points (N P, 3 h w), each channel with mean 0 and deviation 1."""
    deviation, mean = torch.std_mean(patches, (0, 1, 3, 4), keepdim=True)
    deviation = deviation.clamp_min(1e-3)  # of 255: do not divide the rounding of a blank level
    return ((patches - mean) / deviation).flatten(2).flatten(0, 1)


def sliced_wasserstein(a, b, directions=256, seed=0):
    """Two arrays of points (N, D) -> their Wasserstein-1 distance along a line, a float.

    It is the mean over lines of random directions. On a line, sorting pairs the points.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"points have the shapes {a.shape} and {b.shape}, not twice (N, D)")
    lines = np.random.default_rng(seed).standard_normal((directions, a.shape[1]), a.dtype)
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    total = 0.0
    for i in range(0, directions, 16):  # all at once would take much memory
        some = lines[i:i + 16]
        gaps = np.abs(np.sort(some @ a.T) - np.sort(some @ b.T))
        total += gaps.mean(axis=1, dtype=np.float64).sum()
    return float(total / directions)


def evenly_spaced(length, count):
    """`count` indices, or all of them if they are fewer, spread evenly over range(length)."""
    return np.linspace(0, length - 1, min(length, count)).astype(int)


def patches_by_level(images, indices, seed=0):
    """Chosen images of an ImageSet -> {level's size: patches (N, 32, 3, 7, 7)}, in 8-bit steps.

    Raises ValueError unless the images are squares of one size, a power of two from 16 px on.
    """
    levels = {}
    for batch in images.batches(indices, batch_size=8):  # few, for they may be large
        size = max(levels, default=len(batch[0][1]))  # of the set's first image
        for name, image in batch:
            if image.shape != (size, size, 3) or size < 16 or size & (size - 1):
                found = f"{images.path}: {name!a} has {image.shape[1]} x {image.shape[0]} px"
                needed = "squares of one size, a power of two from 16 on, as data.py prepares them"
                raise ValueError(f"{found}; --swd needs {needed}")

        # The places follow from an image's own pixels, so the order of a set does not matter.
        pixels = np.stack([image for _, image in batch])
        generators = [np.random.default_rng((seed, zlib.crc32(image))) for image in pixels]
        for level in laplacian_pyramid(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()):
            levels.setdefault(level.shape[-1], []).append(cut_patches(level, generators))
    return {size: torch.cat(levels.pop(size)) for size in list(levels)}


def compare_by_level(first, second, seed=0):
    """Two ImageSets -> {level's size in px: sliced Wasserstein distance times 1,000}.

    Compares up to 4,096 images of each, spread evenly over the set, by 32 patches of 7x7 of each
    image and level. Takes about 80 MB of memory for each set and level.
    """
    sets = (first, second)
    count = min(len(first.names), len(second.names), SWD_IMAGES)
    found = [patches_by_level(s, evenly_spaced(len(s.names), count), seed) for s in sets]
    count = min(len(levels.get(16, ())) for levels in found)  # some images may be unreadable
    if count < SWD_FEWEST:
        raise ValueError(f"--swd needs {SWD_FEWEST} readable images in each set, not {count}")
    if found[0].keys() != found[1].keys():
        sizes = [f"{s.path} has {max(levels)} px" for s, levels in zip(sets, found, strict=True)]
        raise ValueError(f"{' and '.join(sizes)}; --swd needs images of the same size")

    say(f"sliced Wasserstein distance x 1,000, of {count:,} images of each set")
    distances = {}
    for size in list(found[0]):
        points = []
        for levels in found:
            patches = levels.pop(size)  # not needed any more afterwards, and large
            chosen = patches[evenly_spaced(len(patches), count)]
            points.append(normalise_channels(chosen).numpy())
        distances[size] = 1000 * sliced_wasserstein(*points, seed=seed)
    return distances


# ---------------------------------------------------------------- command line


def fail(message):
    """End with one line and exit code 2."""
    say(f"fid.py: {message}")
    sys.exit(2)


def user_path(text):
    """A path as typed -> Path, with ~ expanded. Empty text is refused: "" would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a shell variable not set?")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # there is no home
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def parse_args():
    parser = argparse.ArgumentParser(
        description="Compare two sets of images: the Frechet Inception Distance.",
        epilog="Pixels are read as pytorch-fid reads them, without colour profiles, orientation "
        "or transparency; to compare with the images that a training run sees, name the .npy "
        "file that data.py prepared. Hidden files are left out.",
    )
    parser.error = fail  # one line; argparse would add the usage
    parser.add_argument(
        "sets", nargs="+", type=user_path, metavar="SET",
        help="a folder (searched recursively), .zip or .npy of images, or an .npz of statistics",
    )
    parser.add_argument(
        "--save-stats", type=user_path, metavar="NPZ",
        help="write the mean and covariance of the only SET to this new file",
    )
    parser.add_argument("--clean", action="store_true", help="resize images as clean-fid does")
    parser.add_argument(
        "--swd", action="store_true",
        help="the sliced Wasserstein distance instead, which needs no weights: prints "
        "the size in px and the distance x 1,000 of each level, and the mean last",
    )
    parser.add_argument(
        "--weights", type=user_path, metavar="FILE",
        help="Inception weights (default: the published ones, downloaded once)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the network runs, say cuda or cpu (default: %(default)s)",
    )
    return parser.parse_args()


def is_statistics(path):
    return path.suffix.lower() == ".npz"


def check_args(args):
    """Refuse at the start what would fail later."""
    if len(args.sets) != (1 if args.save_stats else 2):
        fail("give two sets to compare, or one set and --save-stats FILE.npz")
    for path in args.sets:
        if not path.exists():
            fail(f"{path} does not exist; name a folder, .zip, .npy or .npz")
        if is_statistics(path) and (args.swd or args.save_stats):
            fail(f"{path} holds statistics; --swd and --save-stats need images")
    if args.swd and (args.save_stats or args.clean or args.weights):
        fail("--swd uses no network; leave out --save-stats, --clean and --weights")

    if args.save_stats:
        if not is_statistics(args.save_stats):
            fail(f"--save-stats {args.save_stats} must end in .npz")
        if args.save_stats.exists():
            fail(f"--save-stats {args.save_stats} exists; name a new file")
        try:
            tempfile.TemporaryFile(dir=args.save_stats.parent).close()
        except OSError as error:
            fail(f"--save-stats {args.save_stats} cannot be written ({one_line(error)})")

    try:
        torch.zeros(1, device=args.device)
    except Exception as error:  # torch raises a different error for each kind of device
        fail(f"--device {args.device} is not available ({one_line(error)}); try --device cpu")


def print_swd(sets):
    """Print one line for each level, its size and its distance, and the mean."""
    distances = compare_by_level(*[open_images(path) for path in sets])
    for size, distance in distances.items():
        print(f"{size} {distance:.3f}")
    print(f"mean {np.mean(list(distances.values())):.3f}")


def write_stats(args):
    """Save the statistics of the only set."""
    images = open_images(args.sets[0])
    inception = load_inception(args.weights, args.device)
    save_stats(measure(images, inception, args.clean), args.save_stats)


def print_fid(args):
    """Print the distance of the two sets."""
    # Everything is opened before the first image is measured, so that a bad set fails at once.
    statistics = {path: load_stats(path) for path in args.sets if is_statistics(path)}
    sets = {path: open_images(path) for path in args.sets if not is_statistics(path)}

    if sets:
        for path, (mu, _) in statistics.items():
            if len(mu) != FEATURES:
                raise ValueError(f"{path} holds statistics of {len(mu)} features, not {FEATURES}")
        inception = load_inception(args.weights, args.device)
        for path, images in sets.items():
            measured = measure(images, inception, args.clean)
            statistics[path] = (measured.mean, measured.cov)

    first, second = (statistics[path] for path in args.sets)
    print(f"{frechet_distance(*first, *second):.6f}")


def main():
    args = parse_args()
    check_args(args)
    try:
        if args.swd:
            print_swd(args.sets)
        elif args.save_stats:
            write_stats(args)
        else:
            print_fid(args)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        fail(one_line(error))
    except KeyboardInterrupt:
        fail("interrupted")


if __name__ == "__main__":
    main()
