"""Images for training: any source -> one uint8 array on disk -> endless, seekable batches.

    python data.py photos/ --img-size 128      prepare a folder, and see what a network will see
    images = load_images("photos.zip", 128)    read-only memory map, uint8 (N, 128, 128, 3)
    batches = Batches(images, 64, "cuda")      batches[k] is the k-th batch, in any order

Every image is decoded, centre-cropped and resized once. Training then reads only the array.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import secrets
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torchvision
from PIL import Image, ImageCms, ImageColor, ImageDraw, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

CACHE_DIR = "~/.cache/gan-qp"
SOURCES = "a folder, a valid .zip, torchvision:NAME, synthetic or synthetic:N"
VERSION = 8  # raise it when a source gives different pixels: old arrays are then ignored


# -------------------------------------------------------------------------------- what to import
def load_images(source, img_size, cache_dir=None, quiet=False):
    """Prepare `source` at `img_size`, or find it prepared; return the images as one array.

    source: a folder, a .zip, "torchvision:NAME", "synthetic" (10,000 drawn faces) or "synthetic:N".
    Returns a read-only memory map, uint8 (N, img_size, img_size, 3), sRGB. Images that cannot be
    read are skipped and named, other files are counted. A source that has changed is prepared anew.
    Raises ValueError with one line if the source is at fault, OSError if the disk or memory is.
    """
    cache_dir = Path(cache_dir or CACHE_DIR).expanduser()
    check_outside(cache_dir, source)
    names, read, identity, others = open_source(str(source), cache_dir)
    key = json.dumps([VERSION, identity, img_size])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    stem = re.sub("[^a-zA-Z0-9]", "-", Path(source).stem)[:40] or "images"
    path = cache_dir / f"{stem}-{img_size}-{digest}.npy"

    if not path.exists():
        prepare(names, read, img_size, path, quiet)
    try:
        images = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and start again") from error
    if not quiet:
        print(f"{source}: {len(images):,} images of {img_size} px", flush=True)
        if others:
            print(f"  other files, not used: {others}", flush=True)
    return images


class Batches:
    """Endless training batches; `batches[k]` is a pure function of (seed, k, rank).

    images: uint8 (N, S, S, 3); batch_size: over all `world` processes together. `batches[k]` is
    this rank's part of global batch k: float32 (batch_size / world, 3, S, S) in [-1, 1] on
    `device`. Each epoch is a permutation of its own, so every image comes once before any comes
    twice. On CUDA the whole array moves to the device if it fits in half of the free memory;
    otherwise a thread reads batch k + `ahead`, into pinned memory, while k is in use.
    """

    def __init__(self, images, batch_size, device, seed=0, flip=False, rank=0, world=1):
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} does not divide among {world} processes")
        self.images = images
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.flip = flip
        self.local = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.resident = None  # all images, on the GPU
        self.thread = ThreadPoolExecutor(1)
        self.ahead = 1
        self.reads = {}  # batches that the thread is working on
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if images.nbytes <= free / 2:
                self.resident = torch.tensor(images, device=self.device)
            # pinning opens CUDA on the thread's current GPU, which in a new thread is the first one
            self.thread.submit(torch.cuda.set_device, torch.cuda.current_device())

    def __getitem__(self, k):
        batch = self.fetch(k).permute(0, 3, 1, 2)
        batch = batch.float().div_(127.5).sub_(1)
        if self.flip:
            # The 1 keeps these random numbers apart from those of the permutations.
            numbers = np.random.default_rng((self.seed, k, 1)).random(self.batch_size)[self.local]
            flipped = self.pin(numbers < 0.5).to(self.device, non_blocking=True)
            batch = torch.where(flipped[:, None, None, None], batch.flip(-1), batch)
        return batch

    def indices(self, k):
        """Which images this rank's part of batch k holds, (batch_size / world,)."""
        n = len(self.images)
        places = range(k * self.batch_size, (k + 1) * self.batch_size)[self.local]
        return np.array([permutation(self.seed, i // n, n)[i % n] for i in places])

    def fetch(self, k):
        """Batch k: uint8 (B, S, S, 3) on the device."""
        if self.resident is not None:
            indices = self.pin(self.indices(k))
            return self.resident[indices.to(self.device, non_blocking=True)]
        read = self.reads.get(k) or self.thread.submit(self.read, k)
        self.reads = {j: later for j, later in self.reads.items() if k < j < k + self.ahead}
        self.reads[k + self.ahead] = self.thread.submit(self.read, k + self.ahead)
        return read.result().to(self.device, non_blocking=True)

    def read(self, k):
        return self.pin(self.images[self.indices(k)])

    def pin(self, array):
        """An array as a tensor, which a GPU can copy while the CPU goes on."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of the n images in an epoch, (n,)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


# --------------------------------------------------------------------------------------- sources
def open_source(source, cache_dir):
    """-> names, read, identity, others. Raises ValueError if there is no such source.

    names: of the images, for messages; read(i, size): image i, a PIL image of (size, size);
    identity: what changes when the images do; others: how many files of each kind are not used.
    """
    path = Path(source)  # if it exists, it wins over a name such as "synthetic"
    if source and path.is_dir():
        return open_folder(path.resolve())
    if path.is_file():
        return open_zip(path)
    if source == "synthetic":
        source = "synthetic:10000"
    kind, _, rest = source.partition(":")
    if kind == "synthetic" and rest.isdecimal() and int(rest) > 0:
        return range(int(rest)), draw_face, source, ""
    if kind == "torchvision":
        return open_torchvision(source, rest, cache_dir)
    raise ValueError(f"{source!r} is none of these: {SOURCES}")


def open_folder(root):
    """The images of a folder and its subfolders."""
    files = [(path.relative_to(root).as_posix(), path) for path in walk(root)]
    names, paths, others = choose_images(root, files)
    states = [path.stat() for path in paths]
    identity = [names, [str(root), [[state.st_size, state.st_mtime_ns] for state in states]]]
    return names, lambda i, size: decode(paths[i].read_bytes(), size), identity, others


def open_zip(path):
    """The images of a zip archive, which is read as it is and not unpacked."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is not a valid .zip: {error}") from error
    files = [(entry.filename, entry) for entry in archive.infolist() if not entry.is_dir()]
    names, entries, others = choose_images(path, files)
    identity = [names, [entry.CRC for entry in entries]]
    # read by the entry: one name may stand for several images
    return names, lambda i, size: decode(archive.read(entries[i]), size), identity, others


def open_torchvision(source, name, cache_dir):
    """A data set of torchvision.datasets that can be downloaded."""
    try:
        pairs = getattr(torchvision.datasets, name)(cache_dir / name, download=True)
    except Exception as error:  # no such name, no network, a set that nobody may distribute
        advice = "download its images yourself, and name their folder"
        raise ValueError(f"{source} is not available ({error}); {advice}") from error
    return range(len(pairs)), lambda i, size: to_square(pairs[i][0], size), source, ""


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


def choose_images(source, files):
    """(name, file) pairs -> names and files of the images, sorted by name; a count of the others.

    Files that begin with a dot are hidden, and so are those in a folder that begins with a dot, or
    with @, where network drives keep thumbnails. Raises ValueError if there are no images.
    """
    images = []
    others = Counter()
    for name, file in files:
        inner = PurePosixPath(name)
        folders = set(inner.parts[:-1]) - {".."}  # which `zip -r photos.zip ../photos` writes
        hidden = inner.name.startswith(".") or any(folder[0] in ".@" for folder in folders)
        kind = "hidden" if hidden else ascii(inner.suffix.lower())[1:-1] or "without an extension"
        if kind in IMG_EXTENSIONS:
            images.append((name, file))
        else:
            others[kind] += 1
    others = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common())
    if not images:
        raise ValueError(f"{source} holds no images; other files: {others or 'none'}")
    names, files = zip(*sorted(images, key=lambda image: image[0]), strict=True)
    return names, files, others


def check_outside(folder, source):
    """Raise ValueError if `folder`, where a program writes pictures, lies inside `source`."""
    inside = Path(folder).resolve().is_relative_to(Path(source).resolve())
    if source and Path(source).is_dir() and inside:
        reason = "its pictures would become training images"
        raise ValueError(f"{folder} lies inside {source}, so {reason}: name a folder outside it")


# ------------------------------------------------------------------------------------- one image
def decode(content, size):
    """The bytes of an image file -> `to_square` of the image, or of its first frame."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8 of the size
        return to_square(image, size)


def to_square(image, size):
    """Any PIL image -> RGB, upright, sRGB, over white, centre-cropped and resized to (size, size).

    Raises ValueError unless its pixels are 8-bit.
    """
    if image.mode[0] in "IF":  # 16 or 32 bits, or float: Pillow would clip them at 255
        raise ValueError("its pixels are not 8-bit: convert it")
    image.load()
    profile = image.info.get("icc_profile")
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # metadata that cannot be read is ignored
        pass

    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    unused = image.format == "BMP" and image.getextrema()[-1] == (0, 0)  # a fourth byte, not alpha
    transparent = image.has_transparency_data and not unused
    image = image.convert("RGBA" if transparent else mode)
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    if transparent:
        white = Image.new("RGBA", square.size, "white")
        square = Image.alpha_composite(white, square).convert(mode)

    transform = srgb_transform(profile, mode)
    if transform:
        return ImageCms.applyTransform(square, transform)
    return square.convert("RGB")


@lru_cache(maxsize=64)
def srgb_transform(profile, mode):
    """Pillow's transform from a colour profile (bytes) and mode to sRGB.

    None if there is no profile, or a broken one, or one for another mode.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


# ----------------------------------------------------------------------------------- preparation
def prepare(names, read, size, path, quiet):
    """Write the images of a source into the array `path`; name those that cannot be read."""

    def read_bytes(i):
        try:
            return read(i, size).tobytes()
        except Exception as error:  # Pillow raises nearly every kind of error for bad files
            if re.search("^Memory|out of memory", repr(error)) or getattr(error, "errno", None):
                # not the image's fault: it would be missing from the array for ever
                raise OSError(f"cannot read {names[i]!a} now: {error!r}") from error
            return error

    count = 0
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), size, size, 3)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not quiet:
        print(f"preparing {len(names):,} images in {path}", flush=True)
    with atomic_write(path) as beside, open(beside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        with ThreadPoolExecutor() as pool:
            for i in range(0, len(names), 256):  # bounds the memory
                part = range(i, min(i + 256, len(names)))
                for j, result in zip(part, pool.map(read_bytes, part), strict=True):
                    if isinstance(result, bytes):
                        file.write(result)
                        count += 1
                    elif not quiet:
                        print(f"  skipped {names[j]!a}: {result!a}", flush=True)
        if count == 0:
            raise ValueError(f"none of {len(names):,} images can be read: {result!r}")
        # numpy pads headers to one length, so this one replaces the first exactly
        header["shape"] = (count, size, size, 3)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a hidden name beside `path` to write to, and rename it to `path` once it is whole."""
    beside = Path(path).with_name(f".{secrets.token_hex(4)}-{Path(path).name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- pictures
def evenly_spaced(images, n):
    """n of the images (N, S, S, 3), or all if they are fewer -> tensor (n, 3, S, S)."""
    places = np.linspace(0, len(images) - 1, min(n, len(images))).astype(int)
    return torch.from_numpy(images[places]).permute(0, 3, 1, 2)


def is_picture(path):
    """Whether Pillow can write a file of this name."""
    return Image.registered_extensions().get(Path(path).suffix.lower()) in Image.SAVE


def save_grid(images, path, columns):
    """uint8 images, a tensor (N, 3, S, S) -> one picture, `columns` images wide."""
    with atomic_write(path) as beside:
        torchvision.utils.save_image(images / 255, beside, nrow=columns)


# ---------------------------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(
        description="Prepare images for training, and see them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", help=SOURCES)
    parser.add_argument("--img-size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--cache-dir", default=CACHE_DIR, help="where the prepared array goes")
    args = parser.parse_args()
    if args.img_size < 1:
        parser.error("--img-size must be positive")
    try:
        images = load_images(args.source, args.img_size, args.cache_dir)
        preview = Path(images.filename).with_suffix(".png")
        columns = max(1, min(8, 2048 // args.img_size))
        save_grid(evenly_spaced(images, columns**2), preview, columns)
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"array   {images.filename}\npreview {preview}")


# ----------------------------------------------------------------------------------- drawn faces
WALLS = ["#cdd2dc", "#8ca5c8", "#829682", "#c3af96", "#697387"]
SKINS = ["#ffdbbe", "#f1c29b", "#e0ac78", "#c68650", "#8d5532", "#603c28"]
HAIRS = ["#1e1816", "#462d1e", "#734b28", "#be9650", "#8c3c1e", "#aaaaaa"]
EYES = ["#3c2819", "#466ea0", "#507846", "#281e1e"]
CLOTHES = ["#46506e", "#963c3c", "#3c6e5a", "#beb4a0", "#323237", "#785a82"]


def draw_face(index, size):
    """Face number `index` of the synthetic crowd, always the same: a PIL image of (size, size)."""
    rng = random.Random(index)
    between = rng.uniform

    def pick(colors):
        return ImageColor.getrgb(rng.choice(colors))

    canvas = size * (4 if size <= 128 else 2)  # drawn larger and scaled down: antialiasing
    image = Image.new("RGB", (canvas, canvas), pick(WALLS))

    def oval(color, x, y, rx, ry, light=1.0):
        box = [canvas * v for v in (x - rx, y - ry, x + rx, y + ry)]
        ImageDraw.Draw(image).ellipse(box, tuple(int(c * light) for c in color))

    # Who it is. The order of these calls decides what everybody looks like.
    skin = pick(SKINS)
    hair = pick(HAIRS)
    iris = pick(EYES)
    x = between(0.46, 0.54)
    y = between(0.47, 0.53)
    rx = between(0.21, 0.26)
    ry = between(0.28, 0.33)
    front = x + between(-0.03, 0.03)  # where the face looks
    length = rng.choice([0, 0.02, 0.02, 0.2, 0.4])  # of the hair

    # Long hair, neck, clothes, head, fringe: what is drawn later covers what is there.
    if length:
        oval(hair, x, y - 0.06 + length / 2, rx + 0.02 + length / 8, ry + 0.01 + length / 2)
    oval(skin, x, 0.8, 0.11, 0.15, light=0.85)
    oval(pick(CLOTHES), x, 1.12, between(0.38, 0.48), 0.25)
    oval(skin, x, y, rx, ry)
    if length:
        oval(hair, x, y - 0.85 * ry, rx * between(0.75, 0.95), ry * between(0.2, 0.4))

    # Eyes: shadow, white, iris, pupil, brow.
    eye_y = y - between(0.02, 0.05)
    lid = between(0.018, 0.028)
    for eye in (front - 0.44 * rx, front + 0.44 * rx):
        oval(skin, eye, eye_y - 0.006, 0.05, lid + 0.002, light=0.5)
        oval((250, 250, 248), eye, eye_y, 0.045, lid)
        oval(iris, eye, eye_y, 0.02, min(0.02, lid))
        oval((10, 10, 10), eye, eye_y, 0.009, 0.009)
        oval(hair, eye, eye_y - 0.06, 0.05, 0.011, light=0.7)

    # Nose and lips.
    oval(skin, 1.6 * front - 0.6 * x, y + 0.09, between(0.022, 0.035), 0.012, light=0.8)
    oval(skin, 1.6 * front - 0.6 * x, y + 0.03, 0.014, 0.06, light=0.9)
    red, green, blue = skin
    lips = (min(255, red + 40), green, blue)
    oval(lips, front, y + 0.17, between(0.055, 0.085), between(0.012, 0.022), light=0.72)
    return image.resize((size, size), Image.Resampling.BOX)


if __name__ == "__main__":
    main()
