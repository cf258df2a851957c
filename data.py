"""Images for training: any source -> one uint8 array on disk -> endless, seekable batches.

    python data.py photos/ --img-size 128      prepare a folder, and see what a network will see
    images = load_images("photos.zip", 128)    read-only memory map, uint8 (N, 128, 128, 3)
    batches = Batches(images, 64, "cuda")      batches[k] is the k-th batch, in any order

Every image is decoded, centre-cropped and resized once. Training then reads only the array.
"""
import argparse
import contextlib
import errno
import hashlib
import inspect
import io
import json
import os
import random
import re
import shutil
import sqlite3
import stat
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import (
    Image,
    ImageCms,
    ImageDraw,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

CACHE_DIR = "~/.cache/gan-qp"
SOURCES = "a folder, a .zip, torchvision:NAME, synthetic or synthetic:N"
VERSION = 6  # raise it when a source gives other pixels than before: old caches are then ignored


# ---------------------------------------------------------------- what to import


def load_images(source, img_size, cache_dir=None, quiet=False):
    """Prepare `source` at `img_size`, or find it prepared; return the images as one array.

    source: a folder, a .zip, "torchvision:NAME", "synthetic" (10,000 drawn faces) or "synthetic:N".
    Returns a read-only memory map, uint8 (N, img_size, img_size, 3), sRGB. Files that cannot be
    read are skipped and named on standard error. A source that has changed is prepared anew.
    Raises ValueError with one line if the source is at fault, OSError if the disk is.
    """
    began = time.perf_counter()
    cache_dir = expand_home(cache_dir or CACHE_DIR)
    opened = open_source(str(source), cache_dir)
    key = json.dumps([VERSION, opened.identity, img_size])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    stem = re.sub("[^a-zA-Z0-9]", "-", Path(source).stem)[:40] or "images"
    path = cache_dir / f"{stem}-{img_size}-{digest}.npy"

    how = "prepared before"
    if not is_prepared(path):
        with file_lock(cache_dir / "lock.sqlite"):
            if not is_prepared(path):  # another process may have prepared it in the meantime
                make_room(cache_dir, source, len(opened.names) * img_size**2 * 3, quiet)
                prepare(opened, img_size, path, quiet)
        how = f"prepared in {time.perf_counter() - began:.1f} s"

    images = np.load(path, mmap_mode="r")
    if not quiet:
        skipped = read_record(path)["skipped"]
        counts = f"{len(images):,} images of {img_size} px, {len(skipped):,} skipped"
        say(f"{source}: {counts}, {how}")
        for line in [*list_skipped(skipped, path), *opened.left_out]:
            say(f"  {line}")
    return images


class Batches:
    """Endless training batches; `batches[k]` is a pure function of (seed, k, rank).

    images: uint8 (N, S, S, 3); batch_size: over all `world` processes together. `batches[k]` is
    this rank's part of global batch k: float32 (batch_size / world, 3, S, S) in [-1, 1] on
    `device`. Each epoch is a permutation of its own, so every image comes once before any comes
    twice. On CUDA the whole array moves to the device if it fits in half of the free memory;
    otherwise a thread prepares the next batches in pinned memory.
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
        self.permutations = {}  # of the latest epochs
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}  # batches that the thread is working on

        self.fetch = self.from_disk
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if images.nbytes > free / 2:
                self.fetch = self.from_thread
                # Pinned memory opens the thread's current GPU: in a new thread, the first one.
                gpu = torch.empty(0, device=self.device).device
                self.thread = ThreadPoolExecutor(
                    1, initializer=torch.cuda.set_device, initargs=(gpu,)
                )
            else:
                self.resident = self.on_device()
                self.fetch = self.from_device

    def __getitem__(self, k):
        batch = self.fetch(k).permute(0, 3, 1, 2)
        batch = batch.float().div_(127.5).sub_(1)
        if self.flip:
            # The 1 keeps these random numbers apart from those of the permutations.
            numbers = np.random.default_rng((self.seed, k, 1)).random(self.batch_size)[self.local]
            flipped = self.to_device(numbers < 0.5)
            batch = torch.where(flipped[:, None, None, None], batch.flip(-1), batch)
        if self.device.type == "mps":
            batch = batch.contiguous()  # torch < 2.14: wrong batch norm gradients if channels last
        return batch

    def permutation(self, epoch):
        if epoch not in self.permutations:
            if len(self.permutations) == 2:
                self.permutations.clear()
            rng = np.random.default_rng((self.seed, epoch))
            self.permutations[epoch] = rng.permutation(len(self.images))
        return self.permutations[epoch]

    def indices(self, k):
        """Which images this rank's part of batch k holds, (batch_size / world,)."""
        positions = np.arange(k * self.batch_size, (k + 1) * self.batch_size)[self.local]
        epochs, places = np.divmod(positions, len(self.images))
        parts = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            parts.append(self.permutation(epoch)[places[epochs == epoch]])
        return np.concatenate(parts)

    def to_device(self, array):
        """An array, copied to the device; a GPU copies it while the CPU goes on."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def from_disk(self, k):
        return self.to_device(self.images[self.indices(k)])

    def on_device(self):
        """All images, copied to the device in parts."""
        resident = torch.empty(self.images.shape, dtype=torch.uint8, device=self.device)
        for i in range(0, len(self.images), 1024):
            resident[i:i + 1024] = torch.from_numpy(np.array(self.images[i:i + 1024]))
        return resident

    def from_device(self, k):
        return self.resident[self.to_device(self.indices(k))]

    def from_thread(self, k):
        wanted = (k, k + 1, k + 2)
        self.ahead = {j: batch for j, batch in self.ahead.items() if j in wanted}
        for j in wanted:
            if j not in self.ahead:
                self.ahead[j] = self.thread.submit(self.pinned, j)
        return self.ahead[k].result().to(self.device, non_blocking=True)

    def pinned(self, k):
        """Batch k in memory from which a GPU can copy while the CPU does something else."""
        indices = self.indices(k)
        shape = (len(indices), *self.images.shape[1:])
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        # With mode="clip" numpy writes straight into `out`; the default makes a copy first.
        np.take(self.images, indices, axis=0, out=batch.numpy(), mode="clip")
        return batch


def fingerprint(images):
    """SHA-256 of the contents of an array that `load_images` returned, as text.

    It tells whether two runs saw the same images in the same order, wherever these came from.
    """
    return read_record(Path(images.filename))["sha256"]


# ---------------------------------------------------------------- sources
# A source has `names` (one for each image), `read(i, size)` (image i, a PIL image of (size, size)),
# `identity` (what changes when its images do) and `left_out` (lines about files that are not used).


def open_source(source, cache_dir):
    """The source that this text describes. Raises ValueError if there is none."""
    kind, _, rest = source.partition(":")
    if source == "synthetic":
        return SyntheticFaces(10_000)
    if kind == "synthetic" and rest.isdecimal() and int(rest):
        return SyntheticFaces(int(rest))
    if kind == "torchvision":
        return TorchvisionSet(rest, cache_dir)

    if not source.strip():
        raise ValueError(f"the name of the images is empty; give {SOURCES}")
    path = Path(os.path.realpath(expand_home(source)))
    if path.is_dir():
        opened = Folder(path)
    elif path.is_file() and path.suffix.lower() == ".zip":
        opened = ZipArchive(path)
    else:
        raise ValueError(f"{source} is none of these: {SOURCES}")
    if not opened.names:
        raise ValueError("; ".join([f"{source} holds no images", *opened.left_out]))
    return opened


class SyntheticFaces:
    """Faces 0 to count - 1 of the crowd that `draw_face` draws."""

    left_out = []

    def __init__(self, count):
        self.names = range(count)
        self.identity = f"synthetic:{count}"

    def read(self, i, size):
        return draw_face(i, size)


class TorchvisionSet:
    """A data set of torchvision.datasets, downloaded if it is one of those that can be."""

    left_out = []

    def __init__(self, name, cache_dir):
        self.identity = f"torchvision:{name}"
        try:
            import torchvision  # here, because it takes seconds

            dataset = getattr(torchvision.datasets, name)
            options = {"root": str(cache_dir / name), "download": True}
            known = inspect.signature(dataset).parameters
            with file_lock(cache_dir / "lock.sqlite"):
                self.images = dataset(**{key: options[key] for key in options if key in known})
            self.names = range(len(self.images))
        except Exception as error:  # no such name, no network, a manual download, other arguments
            hint = "download its images yourself and name their folder"
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.identity} is not available ({reason}); {hint}") from error

    def read(self, i, size):
        image = self.images[i][0]
        if not isinstance(image, Image.Image):
            raise ValueError(f"{self.identity} holds {type(image).__name__} items, not images")
        return to_square(image, size)


class Folder:
    """The images of a folder and its subfolders. Links are followed, each real folder once."""

    def __init__(self, path):
        self.path = path
        extensions = picture_extensions()
        others = Counter()
        unreadable = []
        found = {}

        for folder, hidden, files in walk(path, unreadable.append):
            others["hidden"] += hidden
            for file in files:
                name = Path(folder, file).relative_to(path).as_posix()
                kind = why_not_image(name, extensions)
                status = None if kind else file_status(path / name)
                if status:
                    found[name] = [status.st_size, status.st_mtime_ns]
                else:
                    others[kind or "not a regular file"] += 1

        self.names = sorted(found)
        self.identity = [str(path), self.names, [found[name] for name in self.names]]
        self.left_out = list_others(others)
        if others[".zip"]:
            self.left_out.append("a .zip in a folder is not opened; unpack it, or name it instead")
        for error in unreadable[:5]:
            self.left_out.append(f"{error.filename!a} cannot be read ({error.strerror})")

    def read(self, i, size):
        return decode(self.path / self.names[i], size)


class ZipArchive:
    """The images of a zip archive, which is read as it is and not unpacked."""

    def __init__(self, path):
        try:
            self.archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a valid zip archive: {error}") from error
        extensions = picture_extensions()
        others = Counter()
        self.entries = []
        for entry in self.archive.infolist():
            if entry.is_dir():
                continue
            kind = why_not_image(entry.filename, extensions)
            if kind:
                others[kind] += 1
            else:
                self.entries.append(entry)

        # One name may stand for several entries, so each is read by its entry.
        self.entries.sort(key=lambda entry: entry.filename)
        self.names = [entry.filename for entry in self.entries]
        status = os.stat(path)
        self.identity = [str(path), self.names, [status.st_size, status.st_mtime_ns]]
        self.left_out = list_others(others)

    def read(self, i, size):
        return decode(io.BytesIO(self.archive.read(self.entries[i])), size)


def walk(path, on_error):
    """os.walk -> (folder, number of hidden subfolders, files) of each real folder, once.

    Links are followed, but not upwards: that would bring in what lies beside the source.
    """
    visited = {str(parent) for parent in path.parents}  # where links upwards lead
    for folder, subfolders, files in os.walk(path, followlinks=True, onerror=on_error):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        visible = sorted(name for name in subfolders if not is_hidden(name))
        hidden = len(subfolders) - len(visible)
        subfolders[:] = visible  # what os.walk searches next
        yield folder, hidden, files


def file_status(path):
    """os.stat of a regular file; None for a link that leads nowhere, a pipe or a device."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def is_hidden(name):
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def why_not_image(name, extensions):
    """Why a file is left out: it is "hidden", or has this extension. None for an image."""
    if any(is_hidden(part) for part in name.split("/")):
        return "hidden"
    extension = os.path.splitext(name)[1].lower()
    if extension in extensions:
        return None
    return extension or "without an extension"


def list_others(others):
    """One line that counts the files that are not images, or none."""
    others = +others  # without zeros
    if not others:
        return []
    total = sum(others.values())
    kinds = [f"{count:,} {kind}" for kind, count in others.most_common(6)]
    if len(others) > len(kinds):
        kinds.append("...")
    return [f"{total:,} other file{'s' * (total > 1)}: {', '.join(kinds)}"]


# ---------------------------------------------------------------- one image

# Pillow opens these too, but they are documents, films or measurements, not pictures.
NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}

# Pillow refuses a PNG with a compressed text of over 1 MB, which image generators like to write.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# Which modes of a colour profile suit an image of this mode; RGB suits all others.
PROFILE_MODES = {"1": ["L", "RGB"], "L": ["L", "RGB"], "LA": ["L", "RGB"], "CMYK": ["CMYK"]}

# PNG keeps the transparent colour at the depth of the file: factors to 8 bits, by raw mode.
TO_EIGHT_BITS = {"1": 255, "L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}


def decode(file, size):
    """An image file (path or file object) -> `to_square` of it, or of its first frame."""
    try:
        image = Image.open(file, formats=picture_formats())
    except UnidentifiedImageError as error:
        advice = "if it is an image, convert it to 8 or 16 bits"
        raise ValueError(f"Pillow cannot read it; {advice}") from error
    with image:
        image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8 of the size
        return to_square(image, size)


def picture_formats():
    """Pillow's names of the formats of pictures that it can open, in the order it tries them."""
    Image.preinit()  # so that the common formats come first
    formats = set(Image.registered_extensions().values()) - NOT_PICTURES
    return [name for name in Image.ID if name in formats]


def picture_extensions():
    formats = {*picture_formats(), "MPO"}  # MPO is opened as JPEG
    return {name for name, format in Image.registered_extensions().items() if format in formats}


def to_square(image, size):
    """Any PIL image -> RGB, upright, sRGB, over white, centre-cropped and resized to (size, size).

    Raises ValueError if its pixel values have no defined range.
    """
    scale_transparent_color(image)
    image.load()
    image = in_eight_bits(image)
    turn_upright(image)
    image = to_srgb(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def scale_transparent_color(image):
    """Bring a PNG's transparent colour to 8 bits, as Pillow does with the pixels."""
    color = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or color is None or not tiles:
        return
    factor = TO_EIGHT_BITS.get(tiles[0][3])
    if factor and isinstance(color, tuple):
        image.info["transparency"] = tuple(int(value * factor) for value in color)
    elif factor:
        image.info["transparency"] = min(int(color * factor), 255)


def in_eight_bits(image):
    """16-bit grey -> 8-bit grey; any other image as it is, if its range is defined."""
    tags = getattr(image, "tag_v2", {})  # only TIFF has them
    signed_or_float = {2, 3} & set(tags.get(TiffImagePlugin.SAMPLEFORMAT, ()))
    sixteen_bits = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        sixteen_bits = True  # mode "I" also stands for 32 bits, but these formats have none
    if signed_or_float or (image.mode in ("I", "F") and not sixteen_bits):
        raise ValueError("its pixels are float, 32-bit or signed; convert it to 8 or 16 bits")
    if not sixteen_bits:
        return image

    white = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, [16])[0] - 1  # also 12 bits
    grey = np.asarray(image).astype(np.float32)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # WhiteIsZero
        grey = white - grey
    info = dict(image.info)
    transparent = info.pop("transparency", None)
    if transparent is not None:
        grey[grey == transparent] = white
    result = Image.fromarray((grey * (255 / white)).round().astype(np.uint8))
    result.info = info
    return result


def turn_upright(image):
    """Turn the image as its metadata says; metadata that cannot be read is ignored."""
    with contextlib.suppress(Exception):  # malformed EXIF raises nearly every kind of error
        ImageOps.exif_transpose(image, in_place=True)  # turns it before it writes new metadata


def to_srgb(image):
    """An 8-bit image -> RGB, or RGBA if it has transparency, its colour profile applied."""
    if image.mode == "La":
        image = image.convert("LA")
    transform = srgb_transform(image.info.get("icc_profile"))
    if transform and transform.input_mode in PROFILE_MODES.get(image.mode, ["RGB"]):
        colors = transform.apply(image.convert(transform.input_mode))
    else:
        colors = image if image.mode == "RGB" else image.convert("RGB")
    if image.has_transparency_data:
        opacity = image.convert("RGBA").getchannel("A")
        colors = Image.merge("RGBA", [*colors.split(), opacity])
    return colors


@lru_cache(maxsize=16)  # threads may share a transform: LittleCMS only reads it
def srgb_transform(profile):
    """Pillow's transform from a colour profile (bytes) to sRGB, 8 bits a channel.

    None if nothing is to be done: no profile, sRGB itself, a broken one, a Pillow without ImageCms.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[space]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB" and changes_nothing(transform):
            return None
        return transform
    except Exception:  # LittleCMS and Pillow raise several kinds of errors for broken profiles
        return None


def changes_nothing(transform):
    """Does a transform leave RGB colours as they are, to one level? That of sRGB itself does."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    after = transform.apply(Image.fromarray(colors))
    return np.allclose(np.asarray(after), colors, rtol=0, atol=1)


# ---------------------------------------------------------------- preparation

HEADER_SIZE = 128  # bytes of numpy's header, for any number of images

# Errors of a disk, a network drive or a busy machine, which may be gone at the next attempt.
PASSING = {"EIO", "EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT"}


def prepare(source, size, path, quiet):
    """Write all images of a source into the array `path`, and a record in JSON beside it.

    The record holds the SHA-256 of the images, and the name and the error of each skipped one.
    """
    skipped = []
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        file.seek(HEADER_SIZE)  # the header goes in last, when the number of images is known
        for i, (pixels, error) in enumerate(decode_all(source, size)):
            if error:
                skipped.append([str(source.names[i]), error])
            else:
                file.write(pixels)
                digest.update(pixels)
            if not quiet and sys.stderr.isatty() and i % 64 == 0:
                progress = f"preparing {i:,}/{len(source.names):,}"
                print(progress, end="\r", file=sys.stderr, flush=True)

        count = len(source.names) - len(skipped)
        if count == 0:
            name, error = skipped[0]
            raise ValueError(f"no readable image among {len(skipped):,}; {name!a}: {error}")
        file.seek(0)
        shape = (count, size, size, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER_SIZE

    with atomic_write(record_path(path)) as file:
        file.write(json.dumps({"sha256": digest.hexdigest(), "skipped": skipped}).encode())


def decode_all(source, size):
    """Decode in threads, which Pillow lets run at once -> (pixels, None) or (None, error) each."""

    def decode_block(block):
        results = []
        for i in block:
            try:
                results.append((source.read(i, size).tobytes(), None))
            except Exception as error:  # Pillow raises nearly every kind of error for bad files
                if errno.errorcode.get(getattr(error, "errno", None)) in PASSING:
                    # The image may be good: skipped now, it would be missing for ever.
                    message = f"{source.names[i]!a} cannot be read now ({error}); try again later"
                    raise ValueError(message) from error
                results.append((None, f"{type(error).__name__}: {error}"))
        return results

    # A thread takes eight images at a time: handing over one takes as long as a small image.
    everything = range(len(source.names))
    blocks = [everything[i:i + 8] for i in range(0, len(everything), 8)]
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i in range(0, len(blocks), 64):  # limits what waits in memory for a slow disk
            for results in pool.map(decode_block, blocks[i:i + 64]):
                yield from results


def make_room(cache_dir, source, needed, quiet):
    """Remove what killed processes left, and check that `needed` bytes are free."""
    for leftover in cache_dir.glob("*.npy.tmp"):  # nobody is writing it: we hold the lock
        leftover.unlink()
    free = shutil.disk_usage(cache_dir).free
    room = f"{needed / 1e9:.3f} GB for {source}, {free / 1e9:.3f} GB are free in {cache_dir}"
    if needed > free:
        raise OSError(f"{room}; make room, or name another --cache-dir")
    if not quiet:
        say(room)


def say(line):
    """One line on standard error, whatever bytes the names of files hold."""
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)


def record_path(path):
    return path.with_suffix(".json")


def read_record(path):
    return json.loads(record_path(path).read_text())


def is_prepared(path):
    return path.exists() and record_path(path).exists()


def list_skipped(skipped, path):
    """Lines that name the first skipped images, and say where the others are named."""
    lines = [f"{name!a}: {error}" for name, error in skipped[:5]]
    if len(skipped) > 5:
        lines.append(f"... and {len(skipped) - 5:,} more, named in {record_path(path)}")
    return lines


# ---------------------------------------------------------------- files


def expand_home(path):
    """The path with ~ replaced by the home directory. Raises OSError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        advice = "name a path without ~ (for prepared data with --cache-dir)"
        raise OSError(f"{path}: the home directory is not known; {advice}") from error


def typed_path(text):
    """A type for argparse: a path, in which ~ stands for the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return str(expand_home(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(error) from error


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write into, renamed to `path` once it is whole. Failures are OSError."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"{path} could not be written ({reason}); any earlier version is intact"
        raise OSError(message) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def replace(source, target):
    """os.replace, tried for two seconds: Windows refuses it while somebody reads the target."""
    deadline = time.monotonic() + 2
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@contextlib.contextmanager
def file_lock(path, wait=True):
    """Hold an exclusive lock on the file `path`, whose folder is made if it is missing.

    With wait=False, raises BlockingIOError if another process holds the lock; OSError if the
    folder cannot be used. The lock is SQLite's: it works on every system, and ends with its
    process, however that ends.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(path, timeout=1 if wait else 0, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise OSError(f"{path.parent} cannot be used ({error}); name another folder") from error
    with contextlib.closing(lock):
        while not lock.in_transaction:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error as error:
                if "locked" not in str(error):
                    raise OSError(f"{path} cannot be locked ({error})") from error
                if not wait:
                    raise BlockingIOError(f"{path} is locked by another process") from error
        yield


# ---------------------------------------------------------------- pictures


def save_grid(images, path, columns):
    """uint8 images, a tensor (N, S, S, 3) -> one picture, `columns` images wide."""
    from torchvision.utils import make_grid  # here, because it takes seconds

    grid = make_grid(images.cpu().permute(0, 3, 1, 2), columns).permute(1, 2, 0)
    with atomic_write(path) as file:
        # For PNG, level 1 is several times as fast as the default, and little larger.
        Image.fromarray(grid.numpy()).save(file, picture_format(path), compress_level=1)


def picture_format(path):
    """Pillow's name of the format that the extension stands for, or None."""
    return Image.registered_extensions().get(Path(path).suffix.lower())


def is_picture_name(path):
    """Can Pillow write a picture of this extension, whole and in colour? A small one tells."""
    size = (300, 8)  # icons would be made smaller
    file = io.BytesIO()
    try:
        Image.new("RGB", size).save(file, picture_format(path) or "none")
        with Image.open(file, formats=picture_formats()) as image:
            return image.size == size
    except Exception:  # each format has errors of its own
        return False


def evenly_spaced(images, n):
    """n of the images, or all if they are fewer: array (N, S, S, 3) -> tensor (n, S, S, 3)."""
    places = np.linspace(0, len(images) - 1, min(n, len(images)))
    return torch.from_numpy(images[places.astype(int)])


def save_animation(folder, path):
    """The grids in `folder` (000500.png and so on), at most 50, as an animated GIF.

    Pictures that cannot be read are left out. If none is left, nothing is written.
    """
    files = [file for file in Path(folder).glob("*.png") if file.stem.isdecimal()]
    files.sort(key=lambda file: int(file.stem))
    frames = []
    for place in np.linspace(0, len(files) - 1, min(50, len(files))).astype(int):
        with contextlib.suppress(Exception), Image.open(files[place]) as picture:
            frames.append(ImageOps.contain(picture.convert("RGB"), (600, 600)))
    if frames:
        with atomic_write(path) as file:
            options = {"save_all": True, "append_images": frames[1:], "duration": 150, "loop": 0}
            frames[0].save(file, "GIF", **options)


# ---------------------------------------------------------------- command line


def fail(message):
    print(f"data.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(
        description="Prepare images for training, and see them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = fail  # one line, without the list of flags
    parser.add_argument("source", help=SOURCES)
    parser.add_argument("--img-size", type=int, default=128, help="width and height in pixels")
    parser.add_argument(
        "--cache-dir", type=typed_path, default=CACHE_DIR, help="where the prepared array goes"
    )
    args = parser.parse_args()
    if not 1 <= args.img_size <= 4096:
        fail(f"--img-size {args.img_size} must be from 1 to 4096")

    try:
        images = load_images(args.source, args.img_size, args.cache_dir)
        array = Path(images.filename)
        preview = array.with_suffix(".png")
        columns = max(1, min(8, 2048 // args.img_size))
        with file_lock(array.parent / "lock.sqlite"):
            save_grid(evenly_spaced(images, columns**2), preview, columns)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted")
    print(f"array   {array}\npreview {preview}")


# ---------------------------------------------------------------- drawn faces

WALLS = [
    (205, 210, 220), (140, 165, 200), (130, 150, 130),
    (195, 175, 150), (105, 115, 135),
]
SKINS = [
    (255, 219, 190), (241, 194, 155), (224, 172, 120),
    (198, 134, 80), (141, 85, 50), (96, 60, 40),
]
HAIRS = [
    (30, 24, 22), (70, 45, 30), (115, 75, 40),
    (190, 150, 80), (140, 60, 30), (170, 170, 170),
]
EYES = [
    (60, 40, 25), (70, 110, 160),
    (80, 120, 70), (40, 30, 30),
]
CLOTHES = [
    (70, 80, 110), (150, 60, 60), (60, 110, 90),
    (190, 180, 160), (50, 50, 55), (120, 90, 130),
]


def draw_face(index, size):
    """Face number `index` of the synthetic crowd, always the same: a PIL image of (size, size)."""
    rng = random.Random(index)
    between = rng.uniform
    canvas = size * (4 if size <= 128 else 2)  # drawn larger and scaled down: antialiasing
    image = Image.new("RGB", (canvas, canvas), rng.choice(WALLS))

    def oval(color, x, y, rx, ry, light=1.0):
        box = [canvas * v for v in (x - rx, y - ry, x + rx, y + ry)]
        ImageDraw.Draw(image).ellipse(box, tuple(int(c * light) for c in color))

    # Who it is. The order of these calls decides what everybody looks like.
    skin = rng.choice(SKINS)
    hair = rng.choice(HAIRS)
    iris = rng.choice(EYES)
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
    oval(rng.choice(CLOTHES), x, 1.12, between(0.38, 0.48), 0.25)
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
