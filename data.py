"""Images for training: any source -> one uint8 array on disk -> endless, seekable batches.

    python data.py photos/ --img-size 128        prepare a folder, and see what a network will see
    images = load_images("photos.zip", 128)      read-only memory map, uint8 (N, 128, 128, 3)
    batches = Batches(images, 64, "cuda")        batches[k] is the k-th batch, whatever was asked before

Every image is decoded, centre-cropped and resized once; training then reads nothing but the array.
"""
import argparse, contextlib, glob, hashlib, inspect, io, json, os, random, re, shutil, sqlite3, sys, time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

CACHE_DIR = "~/.cache/gan-qp"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
VERSION = 4  # raise it when the same source would give other pixels: caches are then made anew

# ---------------------------------------------------------------- files
@contextlib.contextmanager
def replacing(path):
    """A binary file to write into, renamed to `path` once it is whole. Raises OSError where that fails."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk, of which torch.save makes a RuntimeError
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}); what was there before is intact") from error
    finally:
        beside.unlink(missing_ok=True)

@contextlib.contextmanager
def locked(folder):
    """Make the folder; of several processes, let one after the other do what follows.

    SQLite's lock serves because it works on every system, and ends with its process however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(folder / "lock.sqlite", timeout=1, isolation_level=None)
    with contextlib.closing(lock):
        while not lock.in_transaction:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise OSError(f"{folder} cannot be locked ({error}); name another --cache-dir") from error
        yield

# ---------------------------------------------------------------- one image
def square(image, size):
    """Any PIL image -> RGB, upright, over white, centre-cropped and resized (Lanczos) to (size, size)."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16-bit, 32-bit or float grey: convert() would clip it instead of scaling it
        grey = np.asarray(image, dtype=np.float32)
        high = image.mode.startswith("I;16") or grey.max() > 255
        top = 65535 if high else max(1, 255 * (grey.max() > 1))
        image = Image.fromarray((grey.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)

def decode(file, size):
    """An image file (path or file object), of an animation the first frame -> its `square`."""
    with Image.open(file) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # of which Pillow only warns
            raise ValueError(f"{image.width} x {image.height} pixels are too many: a decompression bomb?")
        image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8, twice what is needed
        return square(image, size)

WALLS = [(205, 210, 220), (140, 165, 200), (130, 150, 130), (195, 175, 150), (105, 115, 135)]
SKINS = [(255, 219, 190), (241, 194, 155), (224, 172, 120), (198, 134, 80), (141, 85, 50), (96, 60, 40)]
HAIRS = [(30, 24, 22), (70, 45, 30), (115, 75, 40), (190, 150, 80), (140, 60, 30), (170, 170, 170)]
EYES = [(60, 40, 25), (70, 110, 160), (80, 120, 70), (40, 30, 30)]
CLOTHES = [(70, 80, 110), (150, 60, 60), (60, 110, 90), (190, 180, 160), (50, 50, 55), (120, 90, 130)]

def draw_face(index, size):
    """Face number `index` of the synthetic crowd, a PIL image of (size, size), the same on every run."""
    rng = random.Random(index)
    between = rng.uniform
    canvas = size * (4 if size <= 128 else 2)  # drawn larger and scaled down: antialiasing
    image = Image.new("RGB", (canvas, canvas), rng.choice(WALLS))

    def oval(color, x, y, rx, ry, light=1.0):
        box = [canvas * v for v in (x - rx, y - ry, x + rx, y + ry)]
        ImageDraw.Draw(image).ellipse(box, tuple(int(c * light) for c in color))

    skin = rng.choice(SKINS)
    hair = rng.choice(HAIRS)
    iris = rng.choice(EYES)
    x = between(0.46, 0.54)
    y = between(0.47, 0.53)
    rx = between(0.21, 0.26)
    ry = between(0.28, 0.33)
    front = x + between(-0.03, 0.03)  # where the face looks
    length = rng.choice([0, 0.02, 0.02, 0.2, 0.4])  # of the hair
    if length:
        oval(hair, x, y - 0.06 + length / 2, rx + 0.02 + length / 8, ry + 0.01 + length / 2)
    oval(skin, x, 0.8, 0.11, 0.15, light=0.85)  # the neck
    oval(rng.choice(CLOTHES), x, 1.12, between(0.38, 0.48), 0.25)
    oval(skin, x, y, rx, ry)
    if length:  # the fringe
        oval(hair, x, y - 0.85 * ry, rx * between(0.75, 0.95), ry * between(0.2, 0.4))
    eye_y = y - between(0.02, 0.05)
    lid = between(0.018, 0.028)
    for eye in (front - 0.44 * rx, front + 0.44 * rx):
        oval(skin, eye, eye_y - 0.006, 0.05, lid + 0.002, light=0.5)
        oval((250, 250, 248), eye, eye_y, 0.045, lid)
        oval(iris, eye, eye_y, 0.02, min(0.02, lid))
        oval((10, 10, 10), eye, eye_y, 0.009, 0.009)
        oval(hair, eye, eye_y - 0.06, 0.05, 0.011, light=0.7)
    oval(skin, 1.6 * front - 0.6 * x, y + 0.09, between(0.022, 0.035), 0.012, light=0.8)
    oval(skin, 1.6 * front - 0.6 * x, y + 0.03, 0.014, 0.06, light=0.9)
    red, green, blue = skin
    lips = (min(255, red + 40), green, blue)
    oval(lips, front, y + 0.17, between(0.055, 0.085), between(0.012, 0.022), light=0.72)
    return image.resize((size, size), Image.Resampling.BOX)

# ---------------------------------------------------------------- sources
def folder_or_zip(path):
    """-> (sorted names of its images, what changes when it does, function of a name to open it)."""
    if path.is_dir():
        names = [name for name in glob.glob("**/*", root_dir=path, recursive=True) if (path / name).is_file()]
        fetch = path.joinpath
    else:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        fetch = lambda name: io.BytesIO(archive.read(name))
    hidden = re.compile(r"(^|/)(\.(?!\./)|__MACOSX/)")
    names = sorted(name for name in names if name.lower().endswith(EXTENSIONS) and not hidden.search(name))
    stats = [os.stat(file) for file in (map(path.joinpath, names) if path.is_dir() else [path])]
    return names, [str(path), names, [(s.st_size, s.st_mtime_ns) for s in stats]], fetch

def torchvision_set(name, folder):
    """torchvision.datasets' NAME, downloaded if it is one of those that can be."""
    import torchvision  # here: it takes seconds
    try:
        kind = getattr(torchvision.datasets, name)
        options = {"root": str(folder / name), "download": True}
        known = inspect.signature(kind).parameters
        with locked(folder):
            return kind(**{key: value for key, value in options.items() if key in known})
    except Exception as error:  # no such name, no network, a manual download, arguments of its own
        hint = "get its images yourself and name the folder"
        raise ValueError(f"torchvision:{name} is not available ({error}); {hint}") from error

def open_source(source, cache_dir):
    """-> (names, identity, function of (name, size) that returns a square image). Raises ValueError."""
    kind, _, rest = source.partition(":")
    path = Path(source).expanduser().resolve()
    if source == "synthetic" or kind == "synthetic" and rest.isdigit() and int(rest):
        return range(int(rest or 10000)), source, draw_face
    if kind == "torchvision":
        dataset = torchvision_set(rest, cache_dir)
        return range(len(dataset)), source, lambda i, size: square(dataset[i][0], size)
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
        raise ValueError(f"{source} is neither a folder, a .zip, torchvision:NAME, synthetic nor synthetic:N")
    try:
        names, identity, fetch = folder_or_zip(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is not a whole zip archive: {error}") from error
    if not names:
        raise ValueError(f"{source} holds no images ({' '.join(EXTENSIONS)})")
    return names, identity, lambda name, size: decode(fetch(name), size)

# ---------------------------------------------------------------- preparation
def in_threads(function, items):
    """function(item) of all items, in order: threads work ahead, which Pillow lets run at once."""
    ahead = deque()
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(items), 8):  # by eights, or handing over would take as long as a small image
            ahead.append(pool.submit(lambda part: [function(item) for item in part], items[i:i + 8]))
            if len(ahead) == 8:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()

def prepare(names, read, size, path):
    """Write all images into the array `path`, and into a .json beside it which were skipped, and why."""
    def attempt(name):
        try:
            return read(name, size).tobytes()
        except Exception as error:  # Pillow raises nearly every kind of error for bad files
            return f"{type(error).__name__}: {error}"

    def write_header(file, n):  # numpy leaves room for the count: a second header is as long as the first
        file.seek(0)
        fields = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
        np.lib.format.write_array_header_1_0(file, fields)

    skipped = []
    with replacing(path) as file:
        write_header(file, len(names))
        for done, (name, result) in enumerate(zip(names, in_threads(attempt, names)), 1):
            if isinstance(result, bytes):
                file.write(result)
            else:
                skipped.append((str(name), result))
            if sys.stderr.isatty() and done % 64 == 0:
                print(f"\rpreparing {done:,}/{len(names):,}", end="\r", file=sys.stderr, flush=True)
        if len(skipped) == len(names):
            name, reason = skipped[0]
            raise ValueError(f"no readable image among {len(names):,}; the first, {name!a}: {reason}")
        write_header(file, len(names) - len(skipped))
        path.with_suffix(".json").write_text(json.dumps(skipped))

def load_images(source, img_size, cache_dir=None, quiet=False):
    """Prepare `source` at `img_size`, or find it prepared -> read-only memory map, uint8 (N, S, S, 3), RGB.

    source: a folder, a .zip, "torchvision:NAME", "synthetic" (10,000 drawn faces) or "synthetic:N". Files
    that cannot be read are skipped, and told on standard error; a source that changed is prepared anew.
    Raises ValueError with one line that says what is wrong with the source, OSError for a full disk.
    """
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    began = time.perf_counter()
    cache_dir = Path(cache_dir or CACHE_DIR).expanduser()
    names, identity, read = open_source(str(source), cache_dir)
    digest = hashlib.sha256(json.dumps([VERSION, identity, img_size]).encode()).hexdigest()[:16]
    stem = re.sub("[^a-zA-Z0-9]", "-", Path(source).stem)[:40]
    path = cache_dir / f"{stem}-{img_size}-{digest}.npy"
    how = "prepared before"
    if not path.exists():
        with locked(cache_dir):
            for dead in cache_dir.glob("*.npy.tmp"):  # of a killed process: nobody else holds the lock
                dead.unlink()
            if not path.exists():
                needed = len(names) * img_size**2 * 3
                free = shutil.disk_usage(cache_dir).free
                room = f"{needed / 1e9:.3f} GB for {source}, {free / 1e9:.3f} GB are free in {cache_dir}"
                if needed > free:
                    raise OSError(f"{room}; make room, or name another --cache-dir")
                say(room)
                prepare(names, read, img_size, path)
        how = f"prepared in {time.perf_counter() - began:.1f} s"
    images = np.load(path, mmap_mode="r")
    skipped = json.loads(path.with_suffix(".json").read_text())
    say(f"{source}: {len(images):,} images of {img_size} px, {len(skipped):,} skipped, {how}")
    for name, reason in skipped[:5]:
        say(f"  {name!a}: {reason}")
    return images

# ---------------------------------------------------------------- batches
class Batches:
    """Endless training batches; `batches[k]` is a pure function of (seed, k, rank).

    images: uint8 (N, S, S, 3); batch_size: over all `world` processes. `batches[k]` is this rank's part of
    global batch k, float32 (batch_size / world, 3, S, S) in [-1, 1], channels last, on `device`. Each epoch
    is a permutation of its own: no image comes twice before all came once. On CUDA the whole array moves to
    the device if it fits in half of the free memory; else a thread pins the next batches ahead of time.
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
        self.order = lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(images)))
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}
        self.fetch = self.from_disk
        if self.device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(self.device)[0] / 2:
            self.fetch = self.from_thread
        elif self.device.type == "cuda":
            self.resident = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
            for i in range(0, len(images), 1024):
                self.resident[i:i + 1024] = torch.from_numpy(np.array(images[i:i + 1024]))
            self.fetch = self.from_device

    def indices(self, k):
        """Which images batch k has, (B,)."""
        places = np.arange(k * self.batch_size, (k + 1) * self.batch_size)[self.local]
        epochs, places = np.divmod(places, len(self.images))
        return np.concatenate([self.order(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def from_disk(self, k):
        return torch.from_numpy(self.images[self.indices(k)]).to(self.device)

    def from_device(self, k):
        indices = torch.from_numpy(self.indices(k)).pin_memory()
        return self.resident[indices.to(self.device, non_blocking=True)]

    def from_thread(self, k):
        for j in (k, k + 1, k + 2):
            self.ahead[j] = self.ahead.get(j) or self.thread.submit(self.pinned, j)
        batch = self.ahead[k].result()
        self.ahead = {j: self.ahead[j] for j in (k + 1, k + 2)}
        return batch.to(self.device, non_blocking=True)

    def pinned(self, k):
        """Batch k in memory from which a GPU can copy by itself."""
        indices = self.indices(k)
        shape = (len(indices), *self.images.shape[1:])
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.take(self.images, indices, axis=0, out=batch.numpy(), mode="clip")  # "raise" would use a buffer
        return batch

    def __getitem__(self, k):
        batch = self.fetch(k).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.flip:
            draws = np.random.default_rng((self.seed, k, 1)).random(self.batch_size)[self.local]
            flips = torch.from_numpy(draws < 0.5).to(self.device, non_blocking=True)
            batch = torch.where(flips[:, None, None, None], batch.flip(-1), batch)
        return batch

# ---------------------------------------------------------------- pictures
def save_grid(images, path, columns):
    """uint8 images, a tensor (N, S, S, 3) -> one picture, `columns` images wide."""
    from torchvision.utils import make_grid  # here: it takes seconds
    Image.fromarray(make_grid(images.cpu().permute(0, 3, 1, 2), columns).permute(1, 2, 0).numpy()).save(path)

def pick(images, n):
    """n of the images, evenly spread, or all if they are fewer: array (N, S, S, 3) -> tensor."""
    picks = np.linspace(0, len(images) - 1, min(n, len(images)))
    return torch.from_numpy(images[picks.astype(int)])

def save_gif(folder, path):
    """The grids in `folder`, at most 50 evenly picked, as an animation."""
    files = sorted(Path(folder).glob("*.png"), key=lambda file: int(file.stem))
    picks = np.unique(np.linspace(0, len(files) - 1, 50).astype(int))
    first, *others = [ImageOps.contain(Image.open(files[i]), (600, 600)) for i in picks]
    first.save(path, save_all=True, append_images=others, duration=150, loop=0)

def main():
    parser = argparse.ArgumentParser(description="Prepare images for training, and see them.")
    parser.error = lambda message: parser.exit(2, f"data.py: {message}\n")
    parser.add_argument("source", help="a folder, a .zip, torchvision:NAME, synthetic or synthetic:N")
    parser.add_argument("--img-size", type=int, default=128, help="side in pixels (128)")
    parser.add_argument("--cache-dir", default=CACHE_DIR, help=f"where the prepared array goes ({CACHE_DIR})")
    args = parser.parse_args()
    if not 1 <= args.img_size <= 4096:
        parser.error(f"--img-size {args.img_size} must be from 1 to 4096")
    try:
        images = load_images(args.source, args.img_size, args.cache_dir)
        columns = max(1, min(8, 2048 // args.img_size))
        preview = Path(images.filename).with_suffix(".png")
        save_grid(pick(images, columns**2), preview, columns)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        parser.error(str(error) or "interrupted")
    print(f"array   {images.filename}\npreview {preview}")

if __name__ == "__main__":
    main()
