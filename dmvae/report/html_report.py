"""Write figures as PNG files and one self-contained HTML page."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    from matplotlib.figure import Figure as Figure
except ImportError as error:
    raise ImportError("matplotlib not found. Run pip install 'dmvae[report]'.") from error


_WORDS = (
    "A row is one sample, observed in several modalities of which any may be missing. The model has a shared latent "
    "z_s for what the modalities of a row have in common, and a private latent z_p per modality for the rest. A nat is "
    "1.44 bits. The NLL is the negative log-likelihood of the observed modalities of a row; smaller is better."
)


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, its title and its explanation."""

    name: str
    title: str
    text: str
    figure: Figure


def write_report(folder: Path, title: str, facts: Mapping[str, str], pictures: Sequence[Picture]) -> Path:
    """Write every picture as PNG and all of them into `report.html`; return the path of that file."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_WORDS)}</p>", "<table>"]
    parts += [f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in facts.items()]
    parts.append("</table>")
    for picture in pictures:
        buffer = io.BytesIO()
        picture.figure.savefig(buffer, format="png", dpi=110)
        (folder / f"{picture.name}.png").write_bytes(buffer.getvalue())
        source = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f"<h2>{html.escape(picture.title)}</h2><p>{html.escape(picture.text)}</p>")
        parts.append(f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{source}">')
    style = (
        "body{font-family:sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
        "img{max-width:100%}th{text-align:left;padding-right:1em}p{line-height:1.4}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    file = folder / "report.html"
    file.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n")
    return file


def is_image(shape: Sequence[int]) -> bool:
    """Return whether values of this shape are drawn as images: at least 8x8, with one or three channels."""
    return len(shape) in (2, 3) and min(shape[-2:]) >= 8 and (len(shape) == 2 or shape[0] in (1, 3))
