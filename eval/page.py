"""The benchmark's results as one HTML page, the papers' numbers beside ours: `python -m eval.page`.

Every results/segment-*.json goes into docs/benchmarks.html, which needs no script and nothing from elsewhere. What papers
report is in eval/paper.toml. Files hold shares from 0 to 1; the page shows percent, and differences in percentage points.
"""

import json
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from eval.common.files import replacing
from eval.datasets.benchmarks import DATASETS
from eval.datasets.protocols import PROTOCOLS
from eval.segment.methods import METHODS
from goca_guidance import TINY_SD, GoCAConfig


SETTING = ["protocol", "prompts", "model"]  # what the rows of one table share
PLACE = [*SETTING, "benchmark", "split", "asked"]  # and those of one of its columns; images that were asked for
NEEDED = {"method", "miou", "images", "skipped", "config", *PLACE[:4]}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/><title>Segmentation benchmarks</title><style>
:root{--ground:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--even:#f6f8fa;--heat:#2f81d0;--less:#c2571a}
@media(prefers-color-scheme:dark){:root{--ground:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--even:#161b22}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:75rem;background:var(--ground);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h2{margin-top:2.5rem;padding-top:1rem;border-top:1px solid var(--line)}p,ul{max-width:48rem}ul{padding-left:1.2rem}
.scroll{overflow-x:auto;margin:1rem 0}.scroll:focus-visible{outline:2px solid var(--heat)}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption,figcaption{text-align:left;font-weight:600}
caption{position:sticky;left:0;width:max-content;max-width:calc(100vw - 2rem);padding:.3rem 0}
small{display:block;font-weight:400;color:var(--soft)}td,th small{white-space:nowrap}
th,td{padding:.3rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);background:var(--ground)}
tbody tr:nth-child(even)>*{background:var(--even)}.text{text-align:left;min-width:9rem;white-space:normal}
tr>:first-child{position:sticky;left:0;z-index:1;text-align:left;max-width:15rem;border-right:1px solid var(--line)}
tbody td.heat{background:color-mix(in srgb,var(--heat) calc(var(--v)*60%),var(--ground))}
details,figure{margin:1rem 0}summary{cursor:pointer;font-weight:600}code{font-size:.9em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dd{margin:0;min-width:0}
svg{display:block;width:100%;max-width:36rem;font-size:12px;fill:var(--ink);stroke-width:1.5}
.more{fill:var(--heat)}.less{fill:var(--less)}.line{stroke:var(--ink)}
@media(max-width:40rem){table,figcaption{font-size:.85rem}th,td{padding:.25rem .4rem}tr>:first-child{max-width:9rem}}
</style></head><body><h1>Segmentation benchmarks</h1>
<p>Mean intersection over union (mIoU) in percent: over all pixels of a set of images, then averaged over classes.
Differences are percentage points; their 95 % intervals are of a paired bootstrap over images. – is not measured.</p><ul>
<li>The model <b>“tiny-sd”</b> is a tiny one that this project trained by itself on synthetic scenes, on which it is measured.
Its numbers say that the methods run and what their parts do there. They say nothing about Stable Diffusion, nor about
Pascal VOC or any other photographs.</li>
<li>Protocol <b>“standard”</b>: validation or test images, void pixels left out, no choice on the evaluated images. Protocol
<b>“goca”</b>, as the released code evaluates: Pascal's training images, void pixels count as background, the background's
threshold is the best one on the evaluated images. Numbers of two protocols are not comparable.</li>
<li>Prompts of <b>“tags”</b> and <b>“captions”</b> take from the ground truth which classes an image shows, those of
“vocabulary” and “tagger” do not. diffcut's segments have no names; the ground truth names them.</li>
<li>The <b>papers' numbers</b> are quoted, most of them at second hand. A run of GoCA's released code by others gave 54.5 where
the paper has 60.7. Our difference is shown for the same protocol, prompts, split and number of images only.</li>
</ul><h2>Methods and benchmarks</h2>
CONTENT</body></html>
"""


# ---- what is read ----------------------------------------------------------------------------------------------------
def read_results(folder: Path) -> list[dict]:
    """The results of `eval.segmentation` in a folder, sorted, each with its file's `name`; ValueError if there are none."""
    results = [json.loads(path.read_text()) | {"name": path.stem} for path in sorted(folder.glob("segment-*.json"))]
    if not results:
        raise ValueError(
            f"Expected segment-*.json in {folder}, but found none: run `python -m eval.segmentation` first."
        )
    for result in results:
        if not result.get("rows") or any(NEEDED - set(row) for row in result["rows"]):
            raise ValueError(f"Expected rows with {sorted(NEEDED)} in {result['name']}.json, but it has others.")
    return results


def read_paper() -> dict:
    """What eval/paper.toml holds, the numbers as a frame; one under a protocol of ours has the place of our rows too."""
    paper = tomllib.loads(Path(__file__).with_name("paper.toml").read_text())
    for number in paper["number"]:
        if (name := number["protocol"]) in PROTOCOLS:
            protocol, benchmark = paper["protocols"][name], number["benchmark"]
            number |= {"split": PROTOCOLS[name].split(benchmark), "prompts": protocol["prompts"]}
            number["asked"] = protocol["images"][benchmark]
    return paper | {"number": pd.DataFrame(paper["number"])}


def frame_of(results: Sequence[dict], models: dict[str, str]) -> pd.DataFrame:
    """All rows of all files, with their `file`; models by their short names where they have one."""
    short = {Path(repository).name: name for name, repository in models.items()}
    rows = [
        {**row, "file": result["name"], "split": result["experiment"]["split"], "source": None}
        for result in results
        for row in result["rows"]
    ]
    frame = pd.DataFrame(rows)
    names = [short.get(Path(model).name, model) for model in frame["model"]]
    return frame.assign(model=names, asked=frame["images"] + frame["skipped"])


# ---- parts of HTML ---------------------------------------------------------------------------------------------------
def percent(share: float | None, sign: str = "") -> str:
    """A share as percent with one decimal; "–" where there is none."""
    return "–" if pd.isna(share) else f"{round(100 * share, 1) + 0.0:{sign}.1f}".replace("-", "−")  # no "−0.0"


def small(words: str) -> str:
    return f"<small>{escape(words)}</small>"


def spelled(value: object) -> str:
    """A table of settings as "name value, name value"; anything else as it is."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def text(words: object) -> str:
    return f'<td class="text">{escape(str(words))}</td>'


def table(caption: str, cells: pd.DataFrame, corner: str = "method") -> str:
    """A table of HTML; the index holds the rows' headers. A cell that begins with "<td" is taken as it is."""
    sides = [' class="text"' if column.str.startswith('<td class="text').any() else "" for _, column in cells.items()]
    heads = zip((corner, *cells.columns), ("", *sides), strict=True)
    columns, lines = "".join(f'<th scope="col"{side}>{name}</th>' for name, side in heads), []
    for name, values in zip(cells.index, cells.fillna("–").to_numpy(), strict=True):
        tagged = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in values)
        lines.append(f'<tr><th scope="row">{name}</th>{tagged}</tr>\n')
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{caption}</caption>\n<thead><tr>{columns}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    )


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n{content}</details>\n" if content else ""


def about(protocol: str, prompts: str, model: str, *more: str) -> str:
    """What the rows of a table share, for its caption."""
    tiny = small("a tiny self-trained model, on synthetic scenes") if model == Path(TINY_SD).name else ""
    return escape(" · ".join([model, *more, f"protocol {protocol}", f"prompts: {prompts}"])) + tiny


# ---- ours beside the papers' -----------------------------------------------------------------------------------------
def with_paper(ours: pd.DataFrame, numbers: pd.DataFrame) -> pd.DataFrame:
    """Our rows, then the papers' numbers at the places that they have in tables of ours.

    One of another protocol than ours stands, marked, where ours of the protocol "standard" are.
    """
    numbers = numbers.assign(reported=numbers["protocol"])
    same = numbers["protocol"].isin(PROTOCOLS)
    places = ours[ours["protocol"] == "standard"][PLACE].drop_duplicates()
    others = numbers[~same].drop(columns=["protocol", "prompts", "split", "asked"])
    return pd.concat([ours, numbers[same], others.merge(places, on=["model", "benchmark"])], ignore_index=True)


def beside(rows: pd.DataFrame) -> str:
    """A cell: our results (rows without a `source`), and below them what papers report, with ours less theirs."""
    ours, lines = rows[rows["source"].isna()]["miou"].unique(), []
    for number in rows.dropna(subset="source").itertuples():
        comparable = number.protocol == number.reported
        gap = f" ({percent(ours[0] - number.miou, '+')})" if comparable and len(ours) else ""
        lines.append(small(f"{number.source} {percent(number.miou)}{gap if comparable else ', own protocol'}"))
    return f"<b>{' / '.join(map(percent, ours)) or '–'}</b>{''.join(lines)}"


def main_tables(both: pd.DataFrame) -> str:
    """For each protocol, source of prompts and model a table of methods and benchmarks."""
    parts = []
    groups = both[both["method"].isin(METHODS)].groupby(SETTING)
    for setting, rows in sorted(groups, key=lambda group: group[1]["source"].notna().all()):
        cells = {}
        for (benchmark, split, asked), column in sorted(
            rows.groupby(PLACE[3:]), key=lambda c: list(DATASETS).index(c[0][0])
        ):
            head = escape(benchmark) + small(f"{split}, {asked:.0f} images")
            cells[head] = {name: beside(part) for name, part in column.groupby("method")}
        note = "" if rows["source"].isna().any() else small("nothing measured here: papers' numbers only")
        order = [name for name in METHODS if name in set(rows["method"])]
        parts.append(table(about(*setting) + note, pd.DataFrame(cells, index=order)))
    return "".join(parts)


def paper_table(paper: dict) -> str:
    """Everything that eval/paper.toml holds."""
    remarks = "".join(f"<li><b>{escape(k)}</b>: {escape(v['remark'])}</li>\n" for k, v in paper["protocols"].items())
    frame = paper["number"].set_index("method").rename(index=escape)
    words = frame[["model", "benchmark", "protocol", "source", "remark"]].map(text)
    words.insert(2, "mIoU", frame["miou"].map(percent))
    return f"<ul>{remarks}</ul>\n{table('Quoted numbers', words)}"


# ---- one file of results ---------------------------------------------------------------------------------------------
def limits(row: dict) -> list[float]:
    """Both ends of the difference's interval, as shares; none for the first row."""
    return [float(end) for end in row["interval"].split(" to ")] if isinstance(row.get("interval"), str) else []


def rows_table(rows: Sequence[dict], caption: str) -> str:
    """Each row with its difference from the first, and what it changes where its name does not say so."""
    lines = [
        {
            "mIoU": f"<b>{percent(row['miou'])}</b>",
            f"difference{small('from the first')}": percent(row.get("difference"), "+"),
            "95 % interval": " to ".join(percent(end, "+") for end in limits(row)) or "–",
            "pixel accuracy": percent(row.get("pixel_accuracy")),
            "images": f"{row['images']:.0f}",
            "skipped": f"{row['skipped']:.0f}",
            "background": "–" if pd.isna(value := row.get("value")) else f"{value:g}",
            "changes": "–" if (change := spelled(changed(row["config"]))) in ("", row["method"]) else text(change),
        }
        for row in rows
    ]
    cells = pd.DataFrame(lines, index=[escape(row["method"]) for row in rows])
    return table(caption, cells.loc[:, (cells != "–").any()])


def plot(rows: Sequence[dict]) -> str:
    """Bars of the differences from the first row with their 95 % intervals, as inline SVG."""
    bars = [(escape(row["method"]), row["difference"], *limits(row)) for row in rows if limits(row)]
    low, high = (end([0, *(end(shares) for _, *shares in bars)]) for end in (min, max))
    marks, told = [], []
    for y, (name, *shares) in zip(range(0, 34 * len(bars), 34), bars, strict=True):
        zero, tip, left, right = (round(10 + 420 * (x - low) / ((high - low) or 1), 1) for x in (0, *shares))
        told.append("{}: {} ({} to {})".format(name, *(percent(share, "+") for share in shares)))
        marks.append(
            f"""<text x="10" y="{y + 13}">{name}: {percent(shares[0], "+")}</text>
<rect class="{"more" if tip > zero else "less"}" x="{min(zero, tip)}" y="{y + 18}" width="{abs(tip - zero):.1f}" height="10"/>
<path class="line" d="M{left} {y + 23}H{right}M{left} {y + 19}v8M{right} {y + 19}v8M{zero} {y + 16}v14"/>
"""
        )
    title = f"mIoU beyond that of {escape(rows[0]['method'])}, percentage points, with 95 % intervals"
    drawing = f'<svg viewBox="0 0 440 {34 * len(bars)}" role="img" aria-label="{title}. {"; ".join(told)}">\n'
    return f"<figure><figcaption>{title}</figcaption>\n{drawing}{''.join(marks)}</svg></figure>\n" if bars else ""


def changed(config: dict) -> dict:
    """What a row's settings change of GoCA, or of the method that they name."""
    return {key: value for key, value in config.items() if (key, value) != ("base", "goca")}


def ablation(rows: pd.DataFrame, quoted: pd.DataFrame, caption: str) -> str:
    """The rows that vary parts of GoCA only, by heads, layers and rescaling."""
    cells: dict[str, dict[str, str]] = {}
    changes = rows["config"].map(changed)
    varied = rows[[bool(own) and own.keys() <= {"heads", "layers", "rescale"} for own in changes]]
    for index in varied.index:
        parts = GoCAConfig(**changes[index])
        heads, rescaled = parts.heads or "preset", "rescaled" if parts.rescale else "not rescaled"
        same = quoted[quoted["method"] == f"heads {heads}, layers {parts.layers}, rescale {parts.rescale}"]
        column = cells.setdefault(f"{parts.layers} layers{small(rescaled)}", {})
        column[heads] = beside(pd.concat([rows.loc[[index]], same]))
    return table(f"Parts of GoCA · {caption}", pd.DataFrame(cells), "heads") if len(varied) > 1 else ""


def class_table(rows: Sequence[dict]) -> str:
    """IoU of every class, the higher the deeper the colour."""
    shares = pd.DataFrame({escape(row["method"]): row["iou"] for row in rows if isinstance(row.get("iou"), dict)})
    cells = shares.map(lambda v: "–" if pd.isna(v) else f'<td class="heat" style="--v:{v:.2f}">{percent(v)}</td>')
    return table("IoU of each class", cells.rename(index=escape), "class") if len(cells) else ""


def value_table(rows: Sequence[dict]) -> str:
    """mIoU at every value of the background's rule, for the rows that had several."""
    tried = {escape(row["method"]): row["values"] for row in rows if isinstance(row.get("values"), dict)}
    cells = pd.DataFrame.from_dict({k: v for k, v in tried.items() if len(v) > 1}, orient="index").map(percent)
    return table("mIoU at each value of the background's rule", cells) if len(cells) else ""


def origin(result: dict) -> str:
    """How a file was made, and which images could not be counted."""
    told = {name: result[name] for name in ("command", "commit", "versions")} | result["experiment"]
    listed = "".join(f"<dt>{escape(k)}</dt><dd><code>{escape(spelled(v))}</code></dd>\n" for k, v in told.items())
    reasons = {row["method"]: pd.Series(row.get("reasons", {}), dtype=str) for row in result["rows"]}
    skipped = pd.concat(reasons).rename("reason").rename_axis(["method", "image"]).reset_index("image").map(text)
    shown = table("Skipped images, up to twenty of each method", skipped.rename(index=escape)) if len(skipped) else ""
    return f"<dl>{listed}</dl>\n{shown}"


def section(result: dict, both: pd.DataFrame) -> str:
    """A file of results: its rows, by setting and benchmark."""
    parts = [f"<h2>{escape(result['name'])}</h2>\n"]
    for place, rows in both[both["file"] == result["name"]].groupby([*SETTING, "benchmark", "split"], sort=False):
        quoted = both.dropna(subset="source").merge(rows[PLACE].drop_duplicates(), on=PLACE)
        each, caption = rows.to_dict("records"), about(*place)
        parts += [ablation(rows, quoted, caption), rows_table(each, caption), plot(each)]
        parts += [folded("Classes", class_table(each)), folded("Values of the background's rule", value_table(each))]
    return "".join([*parts, folded("How it was made", origin(result))])


# ---- the page --------------------------------------------------------------------------------------------------------
def write(results: Path, path: Path) -> None:
    """The page of a folder's results; ValueError where it has none."""
    files, paper = read_results(results), read_paper()
    both = with_paper(frame_of(files, paper["models"]), paper["number"])
    reported = folded("What papers report", paper_table(paper))
    content = main_tables(both) + reported + "".join(section(result, both) for result in files)
    with replacing(path) as part:
        part.write_text(PAGE.replace("CONTENT", content), encoding="utf-8")


if __name__ == "__main__":
    write(Path("results"), Path("docs/benchmarks.html"))
