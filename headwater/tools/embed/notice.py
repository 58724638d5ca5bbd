"""The notice that goes with the embedded shards: whose work they hold, how they are split, and their checksums."""

from __future__ import annotations

TEXT = """# Data in this folder

Small real shards in plain WebDataset tars, made by `python -m headwater.tools.embed`; this file is written by the same
run. Pictures were re-encoded (at most 64 x 64, drawings cropped, most reduced to a palette of 32 colours), sounds resampled
to 16 kHz mono, cut and compressed with Opus.

| what | from | author | licence |
|--|--|--|--|
| pictures, `vendor` google | npm `emoji-datasource-google` 16.0.0 | Noto Emoji, Copyright Google LLC | Apache-2.0 |
| pictures, `vendor` twitter | npm `emoji-datasource-twitter` 16.0.0 | Twemoji, Copyright Twitter, Inc and other contributors | \
CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0/); changed: re-encoded with fewer colours |
| arrangement of both | the same packages (emoji-data) | Copyright (c) 2013 Cal Henderson | MIT (below) |
| emoji titles and tags | npm `emojibase-data` 17.0.0 | Copyright (c) 2017-2019 Miles Johnson | MIT (below) |
| pictures, `vendor` openclipart | Debian `openclipart-png`, `openclipart-svg` 1:0.18+dfsg-19 | the drawings' authors, \
Open Clip Art Library | public domain |
| sounds | Debian `sonic-pi-samples` 3.2.2 | Sonic Pi, from freesound contributors | CC0-1.0 |
| speech | our own output of `espeak-ng` 1.51 | headwater | Apache-2.0 |
| episodes | our own roll-outs in `minigrid` 3.2.0 (MIT, Copyright Farama Foundation) | headwater | Apache-2.0 |
| `probe.*`, with which decoders are tried | `tests/modalities/test_decoding.py` | headwater | Apache-2.0 |

## Splits

- `things-train`: one google emoji or OpenClipart drawing per concept, its title, and the title spoken by one of six voices.
- `speech-train`: titles of `things-train` by another of the six voices.
- `things-seen`: concepts of `things-train`, with twitter's picture and a voice that no training shard holds.
- `things-unseen`: concepts that no training shard holds in any form, with twitter's picture and a held-out voice. No
  training title holds all words of a held-out title, nor the other way round. Single words may be shared.
- `sounds-train`, `sounds-test`: other files, the same groups. `.txt` is the file name in plain words.
- `episodes-train`, `episodes-test`: other level seeds (test from 100000 on); no test episode starts with the first frame and
  mission of a training one. Frame t of `.mp4` stands before action t; `.npy` holds the expert's action in that state, `taken`
  in `.json` the action done (in noisy episodes a random move one time in four). Cut at 12 steps.

{measures}

## Shards

| shard | samples | bytes | SHA-256 |
|--|--:|--:|--|
{rows}

## MIT licence

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def notice(shards: list[tuple[str, int, int, str]], measures: list[str]) -> str:
    """NOTICE.md. shards: name, samples, bytes, SHA-256; measures: lines on the episodes."""
    rows = (f"| {name} | {samples:,} | {size:,} | {digest} |" for name, samples, size, digest in shards)
    return TEXT.format(measures="\n".join(f"- {line}" for line in measures), rows="\n".join(rows))
