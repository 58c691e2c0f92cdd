"""How the report page looks, in light and dark."""

CSS = """\
:root { color-scheme: light dark; --ink: #23262b; --soft: #6a707a; --line: #dcdfe4; --paper: #f7f7f4;
  --sheet: #fff; --good: #1d7f4e; --bad: #c0392b; --accent: #35609b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --soft: #9aa1ab; --line: #383c44;
  --paper: #17191d; --sheet: #1f2227; --good: #4cc38a; --bad: #ff7b6b; --accent: #7fb0ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 0 20px 60px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { padding: 44px 0 16px; }
header p { color: var(--soft); max-width: 80ch; overflow-wrap: anywhere; }
header .stamp { display: inline-block; margin: 0; padding: 2px 18px; border: 3px solid; border-radius: 8px;
  font-size: 30px; font-weight: 800; letter-spacing: .12em; transform: rotate(-2deg); }
header.open .stamp { color: var(--soft); }
header.good .stamp { color: var(--good); }
header.bad .stamp { color: var(--bad); }
h1 { font-size: 30px; line-height: 1.25; margin: 18px 0 8px; }
h2 { margin: 0 0 6px; font-size: 22px; }
h3 { margin: 22px 0 8px; font-size: 15px; color: var(--soft); text-transform: uppercase;
  letter-spacing: .06em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 16px; }
.card, section { background: var(--sheet); border: 1px solid var(--line); border-radius: 12px;
  padding: 18px 22px; }
.card { color: inherit; text-decoration: none; border-top: 5px solid; }
.card.open { border-top-color: var(--soft); }
.card.good { border-top-color: var(--good); }
.card.bad { border-top-color: var(--bad); }
.card h2 { font-size: 17px; }
.card .big { font-size: 40px; font-weight: 700; margin: 0; line-height: 1.2; }
.card.good .big { color: var(--good); }
.card.bad .big { color: var(--bad); }
.card p { margin: 8px 0 0; color: var(--soft); }
section { margin-top: 22px; padding: 24px 26px; }
.question { font-style: italic; color: var(--soft); margin: 0 0 8px; }
.gauge { position: relative; height: 8px; border-radius: 4px; background: var(--line); margin: 8px 0; }
.gauge i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent); }
.gauge b { position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--ink); }
.mark { font-size: 12px; font-weight: 700; text-transform: uppercase; letter-spacing: .06em;
  padding: 2px 8px; border-radius: 6px; color: #fff; vertical-align: middle; }
.mark.open { background: #6a707a; }
.mark.good { background: #1d7f4e; }
.mark.bad { background: #c0392b; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.long { text-align: right; }
small { display: block; color: var(--soft); font-size: 12.5px; line-height: 1.4; }
.beside { display: grid; grid-template-columns: minmax(300px, 2fr) minmax(320px, 3fr); gap: 28px;
  align-items: start; }
@media (max-width: 800px) { .beside { grid-template-columns: 1fr; } }
figure { margin: 0; }
.beside > figure { margin-top: 22px; }
figcaption { color: var(--soft); font-size: 12.5px; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; }
.cases.narrow { grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
article { border: 1px solid var(--line); border-left: 4px solid; border-radius: 8px; padding: 10px 12px; }
article.good { border-left-color: var(--good); }
article.bad { border-left-color: var(--bad); }
article p { margin: 6px 0 0; font-size: 13px; line-height: 1.4; }
.row { display: flex; gap: 8px; align-items: flex-end; }
.row figure { flex: 0 1 128px; }
.row img { width: 100%; border-radius: 4px; display: block; }
.all img { width: 100%; max-width: 1150px; display: block; border-radius: 6px; }
.wall { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.wall img { width: 100%; border-radius: 6px; display: block; }
.why li { margin: 4px 0; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; }
svg text.axis { font-size: 12px; }
svg .tick { stroke: var(--line); }
svg .limit { stroke: var(--ink); stroke-dasharray: 4 4; opacity: .6; }
svg circle.good { fill: var(--good); fill-opacity: .75; }
svg circle.bad { fill: var(--bad); fill-opacity: .85; }
svg polyline { fill: none; }
svg .raw { stroke: var(--accent); opacity: .35; }
svg .mean { stroke: var(--accent); stroke-width: 2; }
svg line.mean { stroke-width: 6; stroke-linecap: round; }
"""
