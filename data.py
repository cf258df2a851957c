"""Images for training: any source -> one uint8 array on disk -> endless, seekable batches.

    python data.py photos/ --img-size 128        prepare a folder, and see what a network will see
    images = load_images("photos.zip", 128)      read-only memory map, uint8 (N, 128, 128, 3)
    batches = Batches(images, 64, "cuda")        batches[k] is the k-th batch, whatever was asked before

Every image is decoded, centre-cropped and resized once; training then reads nothing but the array.
Stands alone: needs torch, numpy and Pillow (and torchvision for torchvision:NAME).
"""
import argparse
import fcntl
import functools
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

CACHE_DIR = "~/.cache/gan-qp"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
VERSION = 1  # raise it when the same source would give other pixels: caches are then made anew


# ---------------------------------------------------------------- one image

def square(image, size):
    """Any PIL image -> RGB, upright, centre-cropped to the square and resized (Lanczos) to (size, size)."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16-bit, 32-bit or float grey: convert() would clip it instead of scaling it
        grey = np.asarray(image, dtype=np.float32)
        top = 65535 if image.mode.startswith("I;16") or grey.max() > 255 else 255 if grey.max() > 1 else 1
        image = Image.fromarray((grey.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def decode(file, size):
    """An image file (path or file object) -> as `square` gives it; the first frame of an animation.

    Raises whatever Pillow raises for a bad file, and an error too for a decompression bomb.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8, still twice what is needed
            return square(image, size)


def draw_face(index, size):
    """Face number `index` of the synthetic crowd, a PIL image of (size, size): the same bytes on every run."""
    rng = random.Random(index)
    canvas = size * (4 if size <= 128 else 2)  # drawn larger and scaled down: antialiasing
    def between(low, high):
        return low + (high - low) * rng.random()
    def tint(color, factor):
        return tuple(min(255, int(c * factor)) for c in color)

    def ellipse(x, y, rx, ry, color):
        draw.ellipse([canvas * v for v in (x - rx, y - ry, x + rx, y + ry)], fill=color)
    def arc(x, y, rx, ry, start, end, color, width):
        draw.arc([canvas * v for v in (x - rx, y - ry, x + rx, y + ry)], start, end, color, max(1, int(width * canvas)))
    def chord(x, y, rx, ry, start, end, color):
        angles = [math.radians(start + (end - start) * i / 40) for i in range(41)]
        polygon(color, *((x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles))
    def polygon(color, *points):
        draw.polygon([(canvas * x, canvas * y) for x, y in points], fill=color)

    top = tuple(rng.randrange(60, 240) for _ in range(3))
    ramp = Image.linear_gradient("L").resize((canvas, canvas))  # black above, white below
    image = Image.composite(Image.new("RGB", (canvas, canvas), tint(top, between(0.4, 1.0))),
                            Image.new("RGB", (canvas, canvas), top), ramp)
    draw = ImageDraw.Draw(image)

    skin = tint(rng.choice([(255, 219, 190), (241, 194, 155), (224, 172, 120), (198, 134, 80), (141, 85, 50), (96, 60, 40)]),
                between(0.9, 1.05))
    hair = tint(rng.choice([(30, 24, 22), (70, 45, 30), (115, 75, 40), (190, 150, 80), (140, 60, 30), (170, 170, 170)]),
                between(0.8, 1.2))
    shirt = tuple(rng.randrange(20, 236) for _ in range(3))
    x, y = 0.5 + between(-0.04, 0.04), 0.5 + between(-0.03, 0.03)  # middle of the face
    rx, ry = between(0.21, 0.26), between(0.28, 0.33)
    turn = between(-0.03, 0.03)  # the head turned left or right moves everything in the face
    style = rng.choice(["short", "short", "long", "bob", "bald"])

    if style in ("long", "bob"):  # hair behind the head
        ellipse(x, y - 0.05, rx + 0.07, ry + 0.05, hair)
        draw.rectangle([canvas * (x - rx - 0.07), canvas * (y - 0.05),
                        canvas * (x + rx + 0.07), canvas * (y + (0.42 if style == "long" else 0.22))], fill=hair)
    ellipse(x, 1.12, between(0.38, 0.48), 0.3, shirt)
    polygon(tint(skin, 0.85), (x - 0.1, y + 0.15), (x + 0.1, y + 0.15), (x + 0.12, 0.88), (x, 0.95), (x - 0.12, 0.88))
    for side in (-1, 1):
        ellipse(x + side * rx, y + 0.02, 0.035, 0.06, tint(skin, 0.9))  # ears
    if style != "bald":
        ellipse(x, y - 0.06, rx + 0.02, ry + 0.01, hair)
    ellipse(x, y, rx, ry, skin)
    if style in ("short", "bald") and rng.random() < 0.3:  # a beard
        chord(x, y, rx, ry, 15, 165, hair)
        ellipse(x, y - 0.01, rx * 0.85, ry * 0.8, skin)
    if style != "bald":  # a fringe: the cap of the head down to a line above the brows
        low = between(27, 40)
        chord(x, y - 0.01, rx + 0.01, ry + 0.02, 180 + low, 360 - low, hair)
    ellipse(x + turn + rx * 0.55, y + 0.08, 0.05, 0.035, tint(skin, 0.96))  # cheeks
    ellipse(x + turn - rx * 0.55, y + 0.08, 0.05, 0.035, tint(skin, 0.96))

    iris = rng.choice([(60, 40, 25), (70, 110, 160), (80, 120, 70), (40, 30, 30)])
    apart, eye_y, open_ = rx * between(0.4, 0.48), y - 0.03 + between(-0.02, 0.01), between(0.018, 0.028)
    look, brow_y, brow_w = between(-0.01, 0.01), between(0.05, 0.07), between(0.012, 0.022)
    glasses = rng.random() < 0.2
    for side in (-1, 1):
        ex = x + turn + side * apart
        ellipse(ex, eye_y, 0.045, open_, (250, 250, 248))
        ellipse(ex + look, eye_y, 0.02, min(0.02, open_), iris)
        ellipse(ex + look, eye_y, 0.009, 0.009, (10, 10, 10))
        ellipse(ex + look - 0.006, eye_y - 0.006, 0.005, 0.005, "white")
        arc(ex, eye_y, 0.048, open_ + 0.006, 190, 350, tint(skin, 0.4), 0.008)
        arc(ex, eye_y - brow_y + 0.03, 0.06, 0.035, 215, 325, tint(hair, 0.7) if style != "bald" else (60, 45, 35), brow_w)
        if glasses:
            arc(ex, eye_y, 0.07, 0.055, 0, 360, (25, 25, 30), 0.01)
    if glasses:
        arc(x + turn, eye_y, 0.035, 0.02, 200, 340, (25, 25, 30), 0.01)

    nose_y, nose_w = y + 0.09 + between(-0.01, 0.015), between(0.02, 0.035)
    polygon(tint(skin, 0.9), (x + turn * 1.3, eye_y), (x + turn * 1.6 + nose_w, nose_y), (x + turn * 1.6 - nose_w, nose_y))
    arc(x + turn * 1.6, nose_y - 0.005, nose_w, 0.016, 10, 170, tint(skin, 0.65), 0.009)
    mouth_y, mouth_w, lips = y + 0.17 + between(-0.01, 0.015), between(0.055, 0.085), tint(skin, 0.72)
    lips = (min(255, lips[0] + 30), lips[1], lips[2])
    if rng.random() < 0.4:  # laughing: teeth between the lips
        chord(x + turn, mouth_y, mouth_w, 0.045, 0, 180, lips)
        chord(x + turn, mouth_y, mouth_w * 0.8, 0.025, 0, 180, (250, 248, 245))
    else:
        ellipse(x + turn, mouth_y, mouth_w, between(0.012, 0.022), lips)
        arc(x + turn, mouth_y - 0.02, mouth_w, between(0.015, 0.03), 20, 160, tint(lips, 0.55), 0.007)
    return image.resize((size, size), Image.Resampling.BOX)


# ---------------------------------------------------------------- sources

def _is_image(name):
    parts = name.split("/")
    hidden = any(part.startswith(".") and part != ".." or part == "__MACOSX" for part in parts)
    return name.lower().endswith(EXTENSIONS) and not hidden


def _folder(path):
    items = []
    for folder, _, names in os.walk(path, followlinks=True):
        prefix = os.path.relpath(folder, path)
        items += [os.path.normpath(os.path.join(prefix, name)) for name in names]
    items = sorted(item for item in items if _is_image(item) and (path / item).is_file())
    stats = [os.stat(path / item) for item in items]
    identity = [str(path), [(item, s.st_size, s.st_mtime_ns) for item, s in zip(items, stats)]]
    return items, identity, lambda: lambda item, size: decode(path / item, size)


def _zip(path):
    with zipfile.ZipFile(path) as archive:
        items = sorted(info.filename for info in archive.infolist() if _is_image(info.filename))
    stat = os.stat(path)

    def opener():  # each process opens the archive itself: a shared file has one shared position
        archive = zipfile.ZipFile(path)
        def read(item, size):
            if archive.getinfo(item).file_size > 2 ** 28:
                raise ValueError("over 256 MiB unpacked")
            return decode(io.BytesIO(archive.read(item)), size)
        return read
    return items, [str(path), stat.st_size, stat.st_mtime_ns], opener


def _torchvision(name, cache_dir):
    import torchvision
    kind = getattr(torchvision.datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise ValueError(f"torchvision has no data set {name!r}; try torchvision:CIFAR10")
    options = {"root": str(cache_dir / name), "download": True}
    options = {k: v for k, v in options.items() if k in inspect.signature(kind).parameters}
    try:
        dataset = kind(**options)
    except Exception as error:  # no network, a data set that wants a manual download, other arguments
        raise ValueError(f"torchvision:{name} could not be had ({error}); get its images yourself and give the folder") from error
    return range(len(dataset)), [], lambda: lambda item, size: square(dataset[item][0], size)


def _source(source, cache_dir):
    """-> (items, identity, opener): opener() gives a function of (item, size) that returns a square RGB image."""
    kind, _, rest = source.partition(":")
    if kind == "synthetic" and (rest.isdigit() and int(rest) > 0 or source == "synthetic"):
        return range(int(rest or 10000)), [], lambda: draw_face
    if kind == "torchvision":
        return _torchvision(rest, cache_dir)
    path = Path(source).expanduser().resolve()
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        try:
            return _zip(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{source} is not a whole zip archive: {error}") from error
    raise ValueError(f"{source} is neither a folder, a .zip, torchvision:NAME, synthetic nor synthetic:N")


# ---------------------------------------------------------------- preparation

def _start_worker(opener):
    global _read
    _read = opener()
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def follow():  # a worker outlives a parent killed by SIGKILL unless it watches
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def _work(item, size):
    try:
        return _read(item, size).tobytes()
    except Exception as error:  # Pillow raises nearly every kind of error for bad files
        return f"{type(error).__name__}: {error}"


def _write_header(file, n, size):
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)})


def _prepare(items, opener, size, path, show):
    """Write the array to `path`, one row an image, beside it first; -> [(name, reason), ...] of the skipped."""
    partial, skipped, count = path.with_suffix(".tmp"), [], 0
    block = max(64, min(1024, 2 ** 28 // (3 * size * size)))  # so much at a time is in memory
    # fork: workers inherit the opener as it is, and need not import torch again
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"), _start_worker, (opener,))
    try:
        with pool, open(partial, "wb") as file:
            _write_header(file, len(items), size)
            for start in range(0, len(items), block):
                part = items[start:start + block]
                for item, result in zip(part, pool.map(_work, part, [size] * len(part), chunksize=8)):
                    if isinstance(result, bytes):
                        file.write(result)
                        count += 1
                    else:
                        skipped.append((str(item), result))
                if show:
                    print(f"\rpreparing {start + len(part):,}/{len(items):,}", end="", file=sys.stderr, flush=True)
            _write_header(file, count, size)  # as long as the first: numpy leaves room for the count to grow
            file.flush()
            os.fsync(file.fileno())
        if show:
            print(end="\r\033[K", file=sys.stderr)
        if not count:
            raise ValueError("no readable image" + (f": {skipped[0][0]!a}: {skipped[0][1]}" if skipped else ""))
        path.with_suffix(".json").write_text(json.dumps({"skipped": skipped}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_images(source, img_size, cache_dir=None, quiet=False):
    """Prepare `source` at `img_size`, or find it prepared.

    source: a folder, a .zip, "torchvision:NAME", "synthetic" (10,000 drawn faces) or "synthetic:N".
    Returns a read-only memory map, uint8 (N, img_size, img_size, 3), RGB. Files that cannot be read are
    skipped and counted on standard error. A source whose files changed is prepared anew. Raises ValueError
    with one clear line where there is no such source or nothing readable in it, OSError for a full disk.
    """
    cache_dir = Path(cache_dir or CACHE_DIR).expanduser()
    items, identity, opener = _source(str(source), cache_dir)
    if not len(items):
        raise ValueError(f"{source} holds no images ({' '.join(EXTENSIONS)})")
    digest = hashlib.sha256(json.dumps([VERSION, str(source), identity, img_size]).encode()).hexdigest()[:16]
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in Path(source).stem)[:40]
    path = cache_dir / f"{stem}-{img_size}-{digest}.npy"
    began = time.perf_counter()
    if fresh := not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cache_dir / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process prepares, others wait and then find it done
            for dead in cache_dir.glob("*.tmp"):  # of a process that was killed: nobody else holds the lock
                dead.unlink()
            if not path.exists():
                try:
                    _prepare(items, opener, img_size, path, show=sys.stderr.isatty() and not quiet)
                except ValueError as error:
                    raise ValueError(f"{source}: {error}") from None
    images = np.load(path, mmap_mode="r")
    if not quiet:
        skipped = json.loads(path.with_suffix(".json").read_text())["skipped"]
        print(f"{source}: {len(images):,} images at {img_size}x{img_size}"
              + (f", prepared in {time.perf_counter() - began:.1f} s" if fresh else "")
              + (f", {len(skipped):,} skipped:" if skipped else ""), file=sys.stderr)
        for name, reason in skipped[:5]:
            print(f"  skipped {name!a}: {reason}", file=sys.stderr)
    return images


# ---------------------------------------------------------------- batches

class Batches:
    """Endless training batches; `batches[k]` is a pure function of (seed, k, rank).

    images: uint8 (N, S, S, 3); batch_size: over all `world` processes together. `batches[k]` is this rank's part
    of global batch k, float32 (batch_size / world, 3, S, S) in [-1, 1], channels last, on `device`. Each epoch
    is a permutation of its own, so no image comes twice before all came once. On CUDA the whole array moves to
    the device when it fits in half of its free memory; else a thread pins the next batch while this one is used.
    """

    def __init__(self, images, batch_size, device, seed=0, flip=False, rank=0, world=1):
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} does not divide among {world} processes")
        self.images, self.device, self.seed, self.flip = images, torch.device(device), seed, flip
        self.batch_size, self.local = batch_size, slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(images)))
        self.resident = self.thread = None
        if self.device.type == "cuda":
            if images.nbytes <= torch.cuda.mem_get_info(self.device)[0] / 2:
                self.resident = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
                for i in range(0, len(images), 1024):
                    self.resident[i:i + 1024] = torch.from_numpy(np.array(images[i:i + 1024]))
            else:
                self.thread, self.ahead = ThreadPoolExecutor(1), {}

    def _indices(self, k):
        where = np.arange(k * self.batch_size, (k + 1) * self.batch_size)[self.local]
        epoch, place = np.divmod(where, len(self.images))
        return np.concatenate([self.order(int(e))[place[epoch == e]] for e in np.unique(epoch)])

    def _pinned(self, k):
        return torch.from_numpy(self.images[self._indices(k)]).pin_memory()

    def __getitem__(self, k):
        if self.resident is not None:
            batch = self.resident[torch.from_numpy(self._indices(k)).pin_memory().to(self.device, non_blocking=True)]
        elif self.thread:
            now = self.ahead.pop(k, None) or self.thread.submit(self._pinned, k)
            self.ahead = {j: self.ahead.get(j) or self.thread.submit(self._pinned, j) for j in (k + 1, k + 2)}
            batch = now.result().to(self.device, non_blocking=True)
        else:
            batch = torch.from_numpy(self.images[self._indices(k)]).to(self.device)
        batch = batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.flip:
            flips = np.random.default_rng((self.seed, k, 1)).random(self.batch_size)[self.local] < 0.5
            flips = torch.from_numpy(flips).to(self.device, non_blocking=True)
            batch = torch.where(flips[:, None, None, None], batch.flip(-1), batch)
        return batch


def main():
    parser = argparse.ArgumentParser(description="Prepare images for training, and see what a network will see.")
    parser.add_argument("source", help="a folder, a .zip, torchvision:NAME, synthetic or synthetic:N")
    parser.add_argument("--img-size", type=int, default=128, help="side of the square images, in pixels (128)")
    parser.add_argument("--cache-dir", default=CACHE_DIR, help=f"where the prepared array goes ({CACHE_DIR})")
    args = parser.parse_args()
    try:
        if not 1 <= args.img_size <= 4096:
            raise ValueError("--img-size must be from 1 to 4096")
        images = load_images(args.source, args.img_size, args.cache_dir)
        tiles = images[np.linspace(0, len(images) - 1, 64).astype(int)] if len(images) > 64 else images
        columns = math.ceil(math.sqrt(len(tiles)))
        sheet = Image.new("RGB", (columns * args.img_size, math.ceil(len(tiles) / columns) * args.img_size))
        for i, tile in enumerate(tiles):
            sheet.paste(Image.fromarray(tile), (i % columns * args.img_size, i // columns * args.img_size))
        preview = Path(images.filename).with_suffix(".png")
        sheet.save(preview)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: {error}\n")
    print(f"array   {images.filename}\npreview {preview}")


if __name__ == "__main__":
    main()
