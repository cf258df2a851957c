"""Images for training: any source -> one uint8 array on disk -> endless, seekable batches.

    python data.py photos/ --img-size 128        prepare a folder, and see what a network will see
    images = load_images("photos.zip", 128)      read-only memory map, uint8 (N, 128, 128, 3)
    batches = Batches(images, 64, "cuda")        batches[k] is the k-th batch, whatever was asked before

Every image is decoded, centre-cropped and resized once; training then reads nothing but the array.
"""
import argparse, fcntl, functools, hashlib, inspect, io, json, math, multiprocessing
import os, random, signal, sys, threading, time, warnings, zipfile
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
    """Any PIL image -> RGB, upright, over white, centre-cropped and resized (Lanczos) to (size, size)."""
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
    """An image file (path or file object), of an animation the first frame -> as `square` gives it.

    Raises whatever Pillow raises for a bad file, and for a decompression bomb.
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
    between, chance = rng.uniform, lambda p: rng.random() < p

    def tint(color, factor):
        return tuple(min(255, int(c * factor)) for c in color)
    def box(x, y, rx, ry):
        return [canvas * v for v in (x - rx, y - ry, x + rx, y + ry)]
    def ellipse(color, *where):
        draw.ellipse(box(*where), fill=color)
    def arc(color, width, start, end, *where):
        draw.arc(box(*where), start, end, color, max(1, int(width * canvas)))
    def polygon(color, *points):
        draw.polygon([(canvas * x, canvas * y) for x, y in points], fill=color)
    def chord(color, start, end, x, y, rx, ry):  # Pillow's own smears some arcs over the whole width
        angles = [math.radians(start + (end - start) * i / 40) for i in range(41)]
        polygon(color, *((x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles))

    wall = tint(rng.choice([(205, 210, 220), (140, 165, 200), (130, 150, 130), (195, 175, 150), (85, 95, 115)]), between(0.8, 1.15))
    shade, shirt = tint(wall, between(0.6, 1.0)), tuple(rng.randrange(30, 220) for _ in range(3))
    image = Image.composite(*(Image.new("RGB", (canvas, canvas), c) for c in (shade, wall)),
                            Image.linear_gradient("L").resize((canvas, canvas)))
    draw = ImageDraw.Draw(image)
    skin = tint(rng.choice([(255, 219, 190), (241, 194, 155), (224, 172, 120), (198, 134, 80), (141, 85, 50),
                            (96, 60, 40)]), between(0.9, 1.05))
    hair = tint(rng.choice([(30, 24, 22), (70, 45, 30), (115, 75, 40), (190, 150, 80), (140, 60, 30),
                            (170, 170, 170)]), between(0.8, 1.2))
    style = rng.choice(["short", "short", "long", "bob", "bald"])
    x, y, rx, ry = 0.5 + between(-0.04, 0.04), 0.5 + between(-0.03, 0.03), between(0.21, 0.26), between(0.28, 0.33)
    turned = x + between(-0.03, 0.03)  # the head looks left or right: brows, eyes, nose and mouth move

    if style in ("long", "bob"):  # hair behind the head
        low, side = y + (0.42 if style == "long" else 0.22), rx + 0.07
        ellipse(hair, x, y - 0.05, side, ry + 0.05)
        polygon(hair, (x - side, y - 0.05), (x + side, y - 0.05), (x + side, low), (x - side, low))
    ellipse(shirt, x, 1.12, between(0.38, 0.48), 0.3)
    polygon(tint(skin, 0.85), (x - 0.1, y + 0.15), (x + 0.1, y + 0.15), (x + 0.12, 0.88), (x, 0.95), (x - 0.12, 0.88))
    for side in (-1, 1):
        ellipse(tint(skin, 0.9), x + side * rx, y + 0.02, 0.035, 0.06)  # ears
    if style != "bald":
        ellipse(hair, x, y - 0.06, rx + 0.02, ry + 0.01)
    ellipse(skin, x, y, rx, ry)
    if style in ("short", "bald") and chance(0.3):  # a beard
        chord(hair, 15, 165, x, y, rx, ry)
        ellipse(skin, x, y - 0.01, rx * 0.85, ry * 0.8)
    if style != "bald":  # the fringe
        low = between(27, 40)
        chord(hair, 180 + low, 360 - low, x, y - 0.01, rx + 0.01, ry + 0.02)

    iris = rng.choice([(60, 40, 25), (70, 110, 160), (80, 120, 70), (40, 30, 30)])
    apart, eye_y, lid = rx * between(0.4, 0.48), y - 0.03 + between(-0.02, 0.01), between(0.018, 0.028)
    look, brow_y, brow = between(-0.01, 0.01), between(0.02, 0.04), between(0.012, 0.022)
    glasses, frame = chance(0.2), (25, 25, 30)
    for side in (-1, 1):
        ellipse(tint(skin, 0.96), turned + side * rx * 0.55, y + 0.08, 0.05, 0.035)  # cheeks
        eye = turned + side * apart
        ellipse((250, 250, 248), eye, eye_y, 0.045, lid)
        ellipse(iris, eye + look, eye_y, 0.02, min(0.02, lid))
        ellipse((10, 10, 10), eye + look, eye_y, 0.009, 0.009)
        ellipse((255, 255, 255), eye + look - 0.006, eye_y - 0.006, 0.005, 0.005)
        arc(tint(skin, 0.4), 0.008, 190, 350, eye, eye_y, 0.048, lid + 0.006)
        arc(tint(hair, 0.7), brow, 215, 325, eye, eye_y - brow_y, 0.06, 0.035)
        if glasses:
            arc(frame, 0.01, 0, 360, eye, eye_y, 0.07, 0.055)
            arc(frame, 0.01, 200, 340, turned, eye_y, 0.035, 0.02)

    nose, nose_y, nose_w = 1.6 * turned - 0.6 * x, y + 0.09 + between(-0.01, 0.015), between(0.02, 0.035)
    polygon(tint(skin, 0.9), (turned, eye_y), (nose + nose_w, nose_y), (nose - nose_w, nose_y))
    arc(tint(skin, 0.65), 0.009, 10, 170, nose, nose_y - 0.005, nose_w, 0.016)
    mouth_y, mouth_w = y + 0.17 + between(-0.01, 0.015), between(0.055, 0.085)
    lips = tint((min(255, skin[0] + 40), *skin[1:]), 0.72)
    if chance(0.4):  # laughing: teeth between the lips
        chord(lips, 0, 180, turned, mouth_y, mouth_w, 0.045)
        chord((250, 248, 245), 0, 180, turned, mouth_y, mouth_w * 0.8, 0.025)
    else:
        ellipse(lips, turned, mouth_y, mouth_w, between(0.012, 0.022))
        arc(tint(lips, 0.55), 0.007, 20, 160, turned, mouth_y - 0.02, mouth_w, between(0.015, 0.03))
    return image.resize((size, size), Image.Resampling.BOX)


# ---------------------------------------------------------------- sources

def _listing(path):
    """The images in a folder or .zip, without hidden ones -> sorted [(name, size, time of change)]."""
    if path.is_dir():
        found = (os.path.join(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = [(os.path.relpath(f, path), s.st_size, s.st_mtime_ns) for f in found if os.path.isfile(f) and (s := os.stat(f))]
    else:
        with zipfile.ZipFile(path) as archive:
            files = [(entry.filename, entry.file_size, os.stat(path).st_mtime_ns) for entry in archive.infolist()]
    def hidden(name):
        return any(part[0:1] == "." and part != ".." or part == "__MACOSX" for part in name.split("/"))
    return sorted(f for f in files if f[0].lower().endswith(EXTENSIONS) and not hidden(f[0]))


def _opener(path):
    """A folder or .zip -> function of (name, size) that returns a square image."""
    if path.is_dir():
        return lambda name, size: decode(path / name, size)
    archive = zipfile.ZipFile(path)
    def read(name, size):
        if archive.getinfo(name).file_size > 2 ** 28:
            raise ValueError("over 256 MiB unpacked")
        return decode(io.BytesIO(archive.read(name)), size)
    return read


def _torchvision(name, cache_dir):
    """-> the data set of that name, downloaded into the cache."""
    import torchvision
    kind = getattr(torchvision.datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise ValueError(f"torchvision has no data set {name!r}; try torchvision:CIFAR10")
    options = {"root": str(cache_dir / name), "download": True}
    try:
        return kind(**{k: v for k, v in options.items() if k in inspect.signature(kind).parameters})
    except Exception as error:  # no network, a manual download, arguments of its own
        raise ValueError(f"torchvision:{name} cannot be had ({error}); get its images yourself and name the folder") from error


def _source(source, cache_dir):
    """-> (names, identity, opener); opener() gives a function of (name, size) that returns a square image."""
    kind, _, rest = source.partition(":")
    if kind == "synthetic" and (source == kind or rest.isdigit() and int(rest)):
        return range(int(rest or 10000)), source, lambda: draw_face
    if kind == "torchvision":
        dataset = _torchvision(rest, cache_dir)
        return range(len(dataset)), source, lambda: lambda i, size: square(dataset[i][0], size)
    path = Path(source).expanduser().resolve()
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
        raise ValueError(f"{source} is neither a folder, a .zip, torchvision:NAME, synthetic nor synthetic:N")
    try:
        files = _listing(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is not a whole zip archive: {error}") from error
    if not files:
        raise ValueError(f"{source} holds no images ({' '.join(EXTENSIONS)})")
    return [name for name, *_ in files], [str(path), files], lambda: _opener(path)


# ---------------------------------------------------------------- preparation

def _start_worker(opener):
    """In each process: open the source anew (a shared archive would have one shared position)."""
    global _read
    _read = opener()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    def follow():  # a worker would outlive a parent killed by SIGKILL
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def _work(name, size):
    try:
        return _read(name, size).tobytes()
    except Exception as error:  # Pillow raises nearly every kind of error for bad files
        return f"{type(error).__name__}: {error}"


def _prepare(names, opener, size, path, show):
    """Write all images into the array `path`, built beside it first, and the skipped into a .json."""
    partial, skipped, count = path.with_suffix(".tmp"), [], 0
    block = max(64, min(1024, 2 ** 28 // (3 * size * size)))  # so many images at a time are in memory
    def header(n):  # numpy leaves room for the count, so that a second one is as long
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)})
    # fork: workers inherit the opener as it is and need not import torch again
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"), _start_worker, (opener,))
    try:
        with pool, open(partial, "wb") as file:
            header(len(names))
            for start in range(0, len(names), block):
                part = names[start:start + block]
                for name, result in zip(part, pool.map(_work, part, [size] * len(part), chunksize=8)):
                    if isinstance(result, bytes):
                        count += bool(file.write(result))
                    else:
                        skipped.append((str(name), result))
                if show:
                    print(f"\rpreparing {start + len(part):,}/{len(names):,}", end="\r", file=sys.stderr, flush=True)
            header(count)
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise ValueError(f"no readable image; {skipped[0][0]!a}: {skipped[0][1]}")
        path.with_suffix(".json").write_text(json.dumps(skipped))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_images(source, img_size, cache_dir=None, quiet=False):
    """Prepare `source` at `img_size`, or find it prepared -> read-only memory map, uint8 (N, img_size, img_size, 3), RGB.

    source: a folder, a .zip, "torchvision:NAME", "synthetic" (10,000 drawn faces) or "synthetic:N". Files that cannot
    be read are skipped, and told on standard error; a source that changed is prepared anew. Raises ValueError with one
    line that says what is wrong with the source, OSError where the cache cannot be written.
    """
    cache_dir, source, began = Path(cache_dir or CACHE_DIR).expanduser(), str(source), time.perf_counter()
    names, identity, opener = _source(source, cache_dir)
    digest = hashlib.sha256(json.dumps([VERSION, identity, img_size]).encode()).hexdigest()[:16]
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in Path(source).stem)[:40]
    path = cache_dir / f"{stem}-{img_size}-{digest}.npy"
    if fresh := not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cache_dir / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process prepares; another waits, and then finds it done
            for dead in cache_dir.glob("*.tmp"):  # of a process that was killed: nobody else holds the lock
                dead.unlink()
            if not path.exists():
                try:
                    _prepare(names, opener, img_size, path, show=sys.stderr.isatty() and not quiet)
                except ValueError as error:
                    raise ValueError(f"{source}: {error}") from None
    images, skipped = np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())
    if not quiet:
        print(f"{source}: {len(images):,} images at {img_size}x{img_size}"
              + (f", prepared in {time.perf_counter() - began:.1f} s" if fresh else "")
              + (f"; {len(skipped):,} skipped:" if skipped else ""), file=sys.stderr)
        for name, reason in skipped[:5]:
            print(f"  {name!a}: {reason}", file=sys.stderr)
    return images


# ---------------------------------------------------------------- batches

class Batches:
    """Endless training batches; `batches[k]` is a pure function of (seed, k, rank).

    images: uint8 (N, S, S, 3); batch_size: over all `world` processes together. `batches[k]` is this rank's part
    of global batch k, float32 (batch_size / world, 3, S, S) in [-1, 1], channels last, on `device`. Each epoch is
    a permutation of its own: no image comes twice before all came once. On CUDA the whole array moves to the
    device when it fits in half of its free memory; else a thread pins the next batches while this one is used.
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


def save_grid(images, path, columns):
    """uint8 (N, 3, S, S) tensor -> one picture, `columns` images wide."""
    from torchvision.utils import make_grid
    Image.fromarray(make_grid(images.cpu(), columns).permute(1, 2, 0).numpy()).save(path)


def save_gif(folder, path):
    """The grids in `folder`, at most 50 evenly picked, as an animation."""
    files = sorted(Path(folder).glob("*.png"), key=lambda file: int(file.stem))
    picks = sorted({i * (len(files) - 1) // 49 for i in range(50)})
    first, *others = [ImageOps.contain(Image.open(files[i]), (600, 600)) for i in picks]
    first.save(path, save_all=True, append_images=others, duration=150, loop=0)


def number(kind, low, high):
    """A type for argparse: an int or a float within bounds, both included."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def main():
    parser = argparse.ArgumentParser(description="Prepare images for training, and see what a network will see.")
    parser.error = lambda message: parser.exit(2, f"data.py: {message}\n")
    parser.add_argument("source", help="a folder, a .zip, torchvision:NAME, synthetic or synthetic:N")
    parser.add_argument("--img-size", type=number(int, 1, 4096), default=128, help="side in pixels (128)")
    parser.add_argument("--cache-dir", default=CACHE_DIR, help=f"where the prepared array goes ({CACHE_DIR})")
    args = parser.parse_args()
    try:
        images = load_images(args.source, args.img_size, args.cache_dir)
        preview = Path(images.filename).with_suffix(".png")
        shown = images[np.linspace(0, len(images) - 1, min(64, len(images))).astype(int)]
        save_grid(torch.from_numpy(shown).permute(0, 3, 1, 2), preview, 8)
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"array   {images.filename}\npreview {preview}")


if __name__ == "__main__":
    main()
