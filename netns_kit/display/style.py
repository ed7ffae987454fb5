"""The style sheet of a view: few rules, all below one class, which prevail over those of a notebook."""

from __future__ import annotations

from functools import cache

_MONO = "font-family:var(--jp-code-font-family,ui-monospace,'DejaVu Sans Mono',monospace)"
_RULES = {
    "": "font:13px/1.5 var(--jp-ui-font-family,system-ui,'DejaVu Sans',sans-serif);overflow:hidden",
    "header": "font-size:14px;margin:0 0 .4em",
    "code": f"{_MONO};background:none;color:inherit;padding:0",
    ".tag": "font-size:12px;border:1px solid;border-radius:9px;padding:0 .6em;margin-left:.3em",
    ".good": "color:#2b9a56",
    ".warn": "color:#b8720a",
    ".bad": "color:#d64545",
    ".dim": "opacity:.7",
    "h4": "font-size:13px;font-weight:600;margin:.7em 0 .2em;line-height:1.5",
    "p": "margin:.2em 0",
    "dl": "display:grid;grid-template-columns:max-content minmax(0,1fr);gap:0 1.2em;margin:.2em 0;padding:0",
    "dt": "opacity:.7;font-weight:normal;margin:0;padding:0;width:auto;float:none;white-space:nowrap",
    "dd": f"margin:0;padding:0;width:auto;float:none;display:block;{_MONO};font-size:12px;overflow-wrap:anywhere",
    "pre": f"{_MONO};font-size:12px;line-height:1.35;margin:.2em 0;padding:0;background:none;color:inherit;"
    "overflow-x:auto",
    ".w": "overflow-x:auto;margin:.2em 0",
    ".p": "overflow-x:auto;margin:.4em 0",
    "table": "border-collapse:collapse;border:0;margin:0;width:auto;max-width:none;table-layout:auto;font-size:12px",
    "tr": "background:none;border:0;padding:0",
    "th": "text-align:left;font-weight:600;padding:.15em .8em .15em 0;white-space:nowrap;border:0;"
    "border-bottom:1px solid rgba(128,128,128,.6);vertical-align:bottom;background:none",
    "td": f"{_MONO};text-align:left;padding:.15em .8em .15em 0;white-space:nowrap;border:0;"
    "border-bottom:1px solid rgba(128,128,128,.25);vertical-align:top;background:none",
    ".r": "text-align:right",
    "label": "cursor:pointer;margin:0;font-weight:inherit",
    "input": "position:absolute;opacity:0;width:0;height:0;margin:0",
    "label i": "font-style:normal;opacity:.3;padding-left:.15em",
    "input:checked+i": "opacity:1",
    "input:focus-visible+i": "outline:1px solid",
    "details": "margin:.1em 0 .1em",
    "summary": f"cursor:pointer;{_MONO};font-size:12px",
    "details>*:not(summary)": "margin-left:1.4em",
}
STYLE = "".join(f".nk.nk.nk {name}".rstrip() + f"{{{rule}}}" for name, rule in _RULES.items())


@cache
def sorting(columns: int) -> str:
    """Return the rules that sort tables with up to that many columns."""
    if not columns:
        return ""
    table = ".nk.nk.nk .w"
    rules = [
        f"{table} table{{display:grid;grid-template-columns:repeat(var(--n),max-content)}}",
        f"{table} thead,{table} tbody{{display:contents}}",
        f"{table} tr{{display:grid;grid-template-columns:subgrid;grid-column:1/-1}}",
        f"{table} thead tr{{order:-9999}}",
    ]
    for column in range(columns):
        chosen = f"{table}:has(th:nth-child({column + 1})"
        rules.append(f"{chosen} .a:checked) tbody tr{{order:var(--k{column})}}")
        rules.append(f"{chosen} .d:checked) tbody tr{{order:calc(0 - var(--k{column}))}}")
    return f"@supports (grid-template-columns:subgrid) and selector(:has(a)){{{''.join(rules)}}}"
