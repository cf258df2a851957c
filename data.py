"""Images for training: any source -> one uint8 array on disk -> endless, seekable batches.

    python data.py photos/ --img-size 128        prepare a folder, and see what a network will see
    images = load_images("photos.zip", 128)      read-only memory map, uint8 (N, 128, 128, 3)
    batches = Batches(images, 64, "cuda")        batches[k] is the k-th batch, whatever was asked before

Every image is decoded, centre-cropped and resized once; training then reads nothing but the array.
"""
import argparse, contextlib, fcntl, functools, glob, hashlib, inspect, io, itertools, json, multiprocessing, os, random, re, sys
import threading, time, warnings, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

CACHE_DIR = "~/.cache/gan-qp"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
VERSION = 3  # raise it when the same source would give other pixels: caches are then made anew

# ---------------------------------------------------------------- files

@contextlib.contextmanager
def replacing(path):
    """A binary file to write into, renamed to `path` once it is whole. Raises OSError, in one line, where that fails."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk, of which torch.save makes a RuntimeError
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); what was there before is intact") from error
    finally:
        beside.unlink(missing_ok=True)

@contextlib.contextmanager
def locked(folder):
    """Make the folder; of several processes, let one after the other do what follows."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

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
    between, canvas = rng.uniform, size * (4 if size <= 128 else 2)  # drawn larger and scaled down: antialiasing
    def shade(color, factor):
        return tuple(min(255, int(c * factor)) for c in color)
    wall = shade(rng.choice([(205, 210, 220), (140, 165, 200), (130, 150, 130), (195, 175, 150), (105, 115, 135)]), between(0.6, 1.1))
    skin = shade(rng.choice([(255, 219, 190), (241, 194, 155), (224, 172, 120), (198, 134, 80), (141, 85, 50), (96, 60, 40)]), between(0.9, 1.05))
    hair = shade(rng.choice([(30, 24, 22), (70, 45, 30), (115, 75, 40), (190, 150, 80), (140, 60, 30), (170, 170, 170)]), between(0.8, 1.2))
    iris = rng.choice([(60, 40, 25), (70, 110, 160), (80, 120, 70), (40, 30, 30)])
    image = Image.new("RGB", (canvas, canvas), wall)
    def oval(color, x, y, rx, ry):
        ImageDraw.Draw(image).ellipse([canvas * v for v in (x - rx, y - ry, x + rx, y + ry)], color)

    x, y, rx, ry = 0.5 + between(-0.04, 0.04), 0.5 + between(-0.03, 0.03), between(0.21, 0.26), between(0.28, 0.33)
    front, length = x + between(-0.03, 0.03), rng.choice([0, 0.02, 0.02, 0.2, 0.4])  # where the face looks; of the hair
    if length:
        oval(hair, x, y - 0.06 + length / 2, rx + 0.02 + length / 8, ry + 0.01 + length / 2)
    oval(shade(skin, 0.85), x, 0.8, 0.11, 0.15)
    oval(tuple(rng.randrange(30, 220) for _ in range(3)), x, 1.12, between(0.38, 0.48), 0.25)
    oval(skin, x, y, rx, ry)
    if length:  # the fringe
        oval(hair, x, y - 0.85 * ry, rx * between(0.75, 0.95), ry * between(0.2, 0.4))
    apart, eye_y, lid, brow = rx * between(0.4, 0.48), y - between(0.02, 0.05), between(0.018, 0.028), between(0.008, 0.014)
    brow_y, nose_y, look = eye_y - between(0.05, 0.07), y + between(0.08, 0.1), between(-0.01, 0.01)
    for side in (-1, 1):
        ear, eye = x + side * rx, front + side * apart
        oval(shade(skin, 0.9), ear, y + 0.02, 0.035, 0.06)
        oval(shade(skin, 0.5), eye, eye_y - 0.006, 0.05, lid + 0.002)
        oval((250, 250, 248), eye, eye_y, 0.045, lid)
        oval(iris, eye + look, eye_y, 0.02, min(0.02, lid))
        oval((10, 10, 10), eye + look, eye_y, 0.009, 0.009)
        oval(shade(hair, 0.7), eye, brow_y, 0.05, brow)
    oval(shade(skin, 0.9), 1.6 * front - 0.6 * x, (eye_y + nose_y) / 2, 0.014, (nose_y - eye_y) / 2)
    oval(shade(skin, 0.8), 1.6 * front - 0.6 * x, nose_y, between(0.022, 0.035), 0.012)
    oval(shade((min(255, skin[0] + 40), *skin[1:]), 0.72), front, y + between(0.16, 0.185), between(0.055, 0.085), between(0.012, 0.022))
    return image.resize((size, size), Image.Resampling.BOX)

# ---------------------------------------------------------------- sources

def _files(path):
    """A folder or .zip -> (sorted names of its images, what changes when it does, function of a name to read it)."""
    if path.is_dir():
        names, fetch = filter(lambda name: (path / name).is_file(), glob.glob("**/*", root_dir=path, recursive=True)), path.joinpath
    else:
        archive = functools.cache(lambda process: zipfile.ZipFile(path))  # a shared one would have one shared position
        names, fetch = archive(0).namelist(), lambda name: io.BytesIO(archive(os.getpid()).open(name).read(2 ** 28))
    hidden = re.compile(r"(^|/)(\.(?!\./)|__MACOSX/)")
    names = sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not hidden.search(n))
    stats = [os.stat(file) for file in (map(path.joinpath, names) if path.is_dir() else [path])]
    return names, [str(path), names, [(s.st_size, s.st_mtime_ns) for s in stats]], fetch

def _source(source, cache_dir):
    """-> (names, identity, function of (name, size) that returns a square image)."""
    kind, _, rest = source.partition(":")
    if kind == "synthetic" and (source == kind or rest.isdigit() and int(rest)):
        return range(int(rest or 10000)), source, draw_face
    if kind == "torchvision":
        import torchvision
        options = {"root": str(cache_dir / rest), "download": True}
        try:
            dataset = getattr(torchvision.datasets, rest)
            with locked(cache_dir):
                dataset = dataset(**{k: v for k, v in options.items() if k in inspect.signature(dataset).parameters})
        except Exception as error:  # no such name, no network, a manual download, arguments of its own
            raise ValueError(f"{source} cannot be had ({error}); get its images yourself and name the folder") from error
        return range(len(dataset)), source, lambda i, size: square(dataset[i][0], size)
    path = Path(source).expanduser().resolve()
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
        raise ValueError(f"{source} is neither a folder, a .zip, torchvision:NAME, synthetic nor synthetic:N")
    try:
        names, identity, fetch = _files(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is not a whole zip archive: {error}") from error
    if not names:
        raise ValueError(f"{source} holds no images ({' '.join(EXTENSIONS)})")
    return names, identity, lambda name, size: decode(fetch(name), size)

# ---------------------------------------------------------------- preparation

def _prepare(names, read, size, path):
    """Write all images into the array `path`, and into a .json beside it which were skipped, and why."""
    def attempt(part):  # in a worker: each name with its pixels, or else with the reason
        for name in part:
            try:
                yield name, read(name, size).tobytes()
            except Exception as error:  # Pillow raises nearly every kind of error for bad files
                yield name, f"{type(error).__name__}: {error}"
    def end_with_parent(_):  # though it be killed: a worker whose results nobody takes would wait, and hold the lock, for ever
        threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    workers = torch.utils.data.DataLoader(
        names, 8, collate_fn=lambda part: list(attempt(part)), num_workers=os.cpu_count(), multiprocessing_context="fork",
        worker_init_fn=end_with_parent, generator=torch.Generator())
    done, skipped = 0, []
    with replacing(path) as file:
        def header(n):  # numpy leaves room for the count, so that a second one is as long
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)})
        header(len(names))
        for name, pixels in itertools.chain.from_iterable(workers):
            done += 1
            if isinstance(pixels, bytes):
                file.write(pixels)
            else:
                skipped.append((str(name), pixels))
            if sys.stderr.isatty() and done % 64 == 0:
                print(f"\rpreparing {done:,}/{len(names):,}", end="\r", file=sys.stderr, flush=True)
        if done == len(skipped):
            raise ValueError(f"no readable image among {done:,}; the first, {skipped[0][0]!a}: {skipped[0][1]}")
        header(done - len(skipped))
        path.with_suffix(".json").write_text(json.dumps(skipped))

def load_images(source, img_size, cache_dir=None, quiet=False):
    """Prepare `source` at `img_size`, or find it prepared -> read-only memory map, uint8 (N, img_size, img_size, 3), RGB.

    source: a folder, a .zip, "torchvision:NAME", "synthetic" (10,000 drawn faces) or "synthetic:N". Files that cannot
    be read are skipped, and told on standard error; a source that changed is prepared anew. Raises ValueError with one
    line that says what is wrong with the source, OSError where the cache cannot be written.
    """
    cache_dir, source, began = Path(cache_dir or CACHE_DIR).expanduser(), str(source), time.perf_counter()
    names, identity, read = _source(source, cache_dir)
    digest = hashlib.sha256(json.dumps([VERSION, identity, img_size]).encode()).hexdigest()[:16]
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in Path(source).stem)[:40]
    path = cache_dir / f"{stem}-{img_size}-{digest}.npy"
    if fresh := not path.exists():
        with locked(cache_dir):
            for dead in cache_dir.glob("*.npy.tmp"):  # of a process that was killed: nobody else holds the lock
                dead.unlink()
            if not path.exists():
                _prepare(names, read, img_size, path)
    images, skipped = np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())
    if not quiet:
        spent = f"prepared in {time.perf_counter() - began:.1f} s" if fresh else "prepared before"
        print(f"{source}: {len(images):,} images at {img_size}x{img_size}, {len(skipped):,} skipped, {spent}", file=sys.stderr)
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
            flips = torch.from_numpy(np.random.default_rng((self.seed, k, 1)).random(self.batch_size)[self.local] < 0.5)
            batch = torch.where(flips.to(self.device, non_blocking=True)[:, None, None, None], batch.flip(-1), batch)
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
    except (ValueError, OSError, KeyboardInterrupt) as error:
        parser.error(str(error) or "interrupted")
    print(f"array   {images.filename}\npreview {preview}")

if __name__ == "__main__":
    main()
