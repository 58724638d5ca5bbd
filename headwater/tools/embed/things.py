"""Named pictures for the embedded shards: which emoji and OpenClipart drawings are taken, and their small PNGs."""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Smileys & Emotion", "People & Body")
DROPPED_SUBGROUPS = {
    "time", "cat-face", "heart", "family", "person", "person-gesture", "person-activity", "person-resting", "person-symbol",
    "hand-single-finger", "hand-fingers-closed", "place-map", "sound", "mail", "money",
}  # fmt: skip
DROPPED_WORDS = re.compile(
    r"\b(man|woman|men|women|mrs|mx|japanese|moon|oncoming|front-facing|leftwards|rightwards|arrow|tilted|suit|low|no"
    r"|behind|zzz|claus|card|chart|calendar|train|sneezing|love|cigarette|middle|pregnant|breast-feeding|bank|book|button)\b"
    r"|^(mouse|cow|tiger|rabbit|horse|monkey|dog|pig|dragon) face$|medium|globe| apple$|person with"
)
FACES = 40
CLIPART = {
    "animals": "armadillo,crawfish,dragon head,emperor penguin,orca,seagull,crow,hen,blue dragonfly,caterpillar,damselfly,"
    "flying wasp,ladybug,brown fish,clown loach,angry monkey,cartoon cat,cartoon squirrel,bull,echidna,fawn,bunny,camel head,"
    "monkey head,dog head,kitten,sleeping cat,bored dog,yellow gourami,bulldog puppy",
    "buildings": "chateau,city horizon,eiffel tower,grain elevator,lighthouse,water tower,wooden barrel,wooden table",
    "containers": "ammo can,cardboard box,paperbag",
    "electronics": "camcorder,capacitors,resistors,diodes,satellite dish,transistor",
    "food": "bowl,candied apples,champignon,lasagna,onion rings,pizza slice,pumpkin,soup,submarine sandwich,coffee,"
    "lemonade,milk carton,mug,martini glass,wine corks,garlic toast,hash browns,blueberry muffin,pasta,potato chips,cheese,"
    "cake,apple pie,cherry pie,pumpkin pie,apple core,bananas,orange slice,breakfast sausage,fried eggs,corndog,salami",
    "office": "ballpoint pen,certificate,desk lamp,folder,magnifying glass,picture frame,postage stamp,simple calculator,"
    "thumbtack,cellular phone,red telephone,glossy paper",
    "plants": "acorn,bamboo,daffodil,reed,toadstool,daisy,fern,flowers",
    "recreation": "dartboard,sand castle,scuba tank,audio cassette,chess pieces,boombox,cello,electric guitar,"
    "french horn,acoustic guitar,celtic harp,headphones,oboe,piano,tenor trombone,treble clef,vinyl disc,xylophone,war drum,"
    "dancer,baseball bat,baseball cap,baseball glove,binoculars,cricket bat,football helmet,surfboard,tennis shoe,abc blocks,"
    "beach ball,rubber duck,wagon",
    "science": "chemistry flask,jupiter,venus",
    "tools": "blacksmith hammer,bottle,brush roller,drill,ironing board,paint roller,padlock,pan,saw,scalpel,trowel,"
    "digital camera,katana,longsword,sword,keyring",
    "transportation": "yield sign,big truck,small truck,trawler,military airplane,tramway,old car",
}


class Concept(NamedTuple):
    """One named thing. name: its identity in file names; vendors: vendor -> picture file."""

    name: str
    title: str
    category: str
    tags: tuple[str, ...]
    vendors: dict[str, Path]


def rank(*words: str) -> int:
    """A fixed pseudo-random number of some words, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:8], "big")


def emoji(modules: Path) -> list[Concept]:
    """Emoji with a short title that two vendors draw, distinct enough to be told apart; in the order of their rank."""
    labels = {e["hexcode"].replace("-FE0F", ""): e for e in _read_json(modules / "emojibase-data/en/data.json")}
    concepts, titles, faces = [], set(), 0
    rows = _read_json(modules / "emoji-datasource-google/emoji.json")
    for row in sorted(rows, key=lambda r: rank(r["unified"])):
        label = labels.get(row["unified"].replace("-FE0F", ""))
        if label is None or not (row["has_img_google"] and row["has_img_twitter"]):
            continue
        title = label["label"].replace("\u2019", "'")
        face = row["subcategory"].startswith("face-") and row["subcategory"] != "face-costume"
        if not _wanted(row, title) or title in titles or (face and faces >= FACES):
            continue
        faces += face
        titles.add(title)
        place = "emoji-datasource-{0}/img/{0}/64/" + row["image"]
        vendors = {v: modules / place.format(v) for v in ("google", "twitter")}
        concepts.append(Concept(_slug(title), title, row["category"].lower(), tuple(label.get("tags", ())[:6]), vendors))
    return concepts


def _wanted(row: dict[str, Any], title: str) -> bool:
    if row["category"] not in GROUPS or row["subcategory"] in DROPPED_SUBGROUPS:
        return False
    return (
        re.fullmatch(r"[A-Za-zñ'-]+( [A-Za-zñ'-]+){0,2}", title) is not None
        and len(title) <= 20
        and not (DROPPED_WORDS.search(title.lower()))
    )


def clipart(root: Path, taken: set[str]) -> list[Concept]:
    """The OpenClipart drawings listed above, the first file of each title; titles in `taken` are left out."""
    concepts = []
    for folder, names in CLIPART.items():
        wanted = set(names.split(",")) - taken
        for svg in sorted((root / "svg" / folder).rglob("*.svg")):
            title, tags = _described(svg)
            png = root / "png" / svg.relative_to(root / "svg").with_suffix(".png")
            if title in wanted and png.exists():
                wanted.remove(title)
                concepts.append(Concept(_slug(title), title, folder, tags[:6], {"openclipart": png}))
    return sorted(concepts, key=lambda c: rank(c.name))


def _described(svg: Path) -> tuple[str, tuple[str, ...]]:
    """Lower-case title and tags from the RDF of a drawing, read as text: some drawings are not well-formed XML."""
    text = svg.read_bytes().decode("utf-8", "replace")
    title = re.search(r"<dc:title>(.*?)</dc:title>", text, re.S)
    tags = [html.unescape(t).strip().lower() for t in re.findall(r"<rdf:li>(.*?)</rdf:li>", text, re.S)]
    return html.unescape(title[1]).strip().lower() if title else "", tuple(dict.fromkeys(t for t in tags if t))


def picture(path: Path, colours: int = 32, size: int = 64) -> bytes:
    """A PNG of at most 64 x 64.

    Palette and grey + alpha files stay as they are (every reader must cope with them), and so does one RGBA file in 24; the
    others are reduced to `colours` colours with alpha, if that is smaller.
    """
    from PIL import Image

    content = path.read_bytes()
    image: Image.Image = Image.open(io.BytesIO(content))
    small = max(image.size) <= size
    if small and (image.mode in ("P", "LA") or rank(path.name, "whole") % 24 == 0):
        return content
    image = image.convert("RGBA")
    if not small:
        image = image.crop(image.getchannel("A").getbbox())
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (size, size))
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    file = io.BytesIO()
    image.quantize(colours, method=Image.Quantize.FASTOCTREE).save(file, "PNG", optimize=True)
    return min(file.getvalue(), content, key=len) if small else file.getvalue()


def visible(content: bytes) -> bool:
    """Whether a PNG shows anything: some pixels opaque, and not all of one colour."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"), np.float32)
    alpha = pixels[..., 3] / 255
    return bool(alpha.mean() > 0.05 and (pixels[..., :3].std(axis=(0, 1)).max() > 1 or alpha.std() > 0.05))


def _slug(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower().replace("ñ", "n")).strip("-")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
