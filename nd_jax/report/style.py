"""The report's style sheet: light, dark and print, from a phone's width up."""

# Series colours keep a contrast of at least 4.5 : 1 to the background in both themes. A wide table breaks its headings
# and words to fit a desktop's width; on a phone it keeps them whole and scrolls in its box.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b2330; --soft: #5a6575; --rule: #dfe3e9; --wash: #f5f7fa; --accent: #0b5cad;
  --s0: #0b5cad; --s1: #b8400a; --s2: #0d7355; --s3: #93359a; --s4: #7a6000; --s5: #4b5563;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161d; --ink: #e6eaf0; --soft: #9aa6b6; --rule: #2c3440; --wash: #1a2029; --accent: #79b8ff;
    --s0: #79b8ff; --s1: #ffa266; --s2: #56d3a6; --s3: #e39bf0; --s4: #e3c04d; --s5: #a9b5c5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 1.25rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 {
  margin: 3rem 0 1rem; padding-top: 1.25rem; border-top: 1px solid var(--rule); font-size: 1.3rem;
  line-height: 1.3;
}
h2, td, th, p, figcaption, dt, dd { overflow-wrap: break-word; }
p { margin: 0 0 1rem; max-width: 46rem; white-space: pre-line; }
a { color: var(--accent); }
figure { margin: 1.5rem 0; max-width: 46rem; }
figcaption, caption { margin-bottom: .5rem; text-align: left; font-weight: 600; }
img + figcaption, video + figcaption { margin: .5rem 0 0; color: var(--soft); font-size: .9rem; font-weight: 400; }
.note, .axis, .last { color: var(--soft); }
.note { margin: .25rem 0 0; font-size: .85rem; }

.summary {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 0 0 1.5rem;
}
.summary div { padding: .7rem .9rem; border: 1px solid var(--rule); border-radius: 8px; background: var(--wash); }
.summary dt { color: var(--soft); font-size: .85rem; }
.summary dd {
  margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
nav ol {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; list-style: none;
  font-size: .95rem;
}

.scroll { overflow-x: auto; margin: 1.5rem 0; }
table { width: max-content; border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: .45rem 1.1rem .45rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
}
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 32rem; }
th:last-child, td:last-child { padding-right: 0; }
th.r, td.r { text-align: right; }
td.r { white-space: nowrap; }
th.c, td.c { text-align: center; }

pre {
  overflow-x: auto; margin: 1rem 0; padding: .8rem 1rem; border: 1px solid var(--rule); border-radius: 8px;
  background: var(--wash); font: .87rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
details { margin: 1rem 0; padding: .6rem 1rem; border: 1px solid var(--rule); border-radius: 8px; }
summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: .75rem; }
img, video { display: block; max-width: 100%; height: auto; border-radius: 6px; }

.plot > svg { display: block; width: 100%; height: auto; overflow: visible; }
.plot .legend {
  display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; margin: 0 0 .4rem; padding: 0; list-style: none;
  font-size: .9rem;
}
.plot .axis { margin: 0; font-size: .85rem; }
.plot .axis.x { text-align: center; }
.key { width: 28px; height: 8px; margin-right: .4rem; vertical-align: middle; }
.grid, .mark, .frame, .line, .key { fill: none; }
.grid { stroke: var(--rule); }
.mark, .frame { stroke: var(--soft); }
.tick { fill: var(--soft); font-size: 12px; }
.line, .key { stroke-width: 2; stroke-linejoin: round; }
.line .dot { stroke-width: 5; stroke-linecap: round; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); }
.s3 { stroke: var(--s3); } .s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }

.bars dl {
  display: grid; grid-template-columns: fit-content(14rem) 1fr; gap: .4rem 1rem; align-items: center; margin: 0;
  font-size: .94rem;
}
.bars dd { display: flex; align-items: center; gap: .75rem; margin: 0; }
.bars .track { position: relative; flex: 1; height: 1.1rem; border-radius: 3px; background: var(--wash); }
.bars i {
  position: absolute; top: 0; bottom: 0; border-radius: 3px; background: var(--s0); print-color-adjust: exact;
}
.bars b { min-width: 5.5rem; font-variant-numeric: tabular-nums; font-weight: 600; }

@media (min-width: 48rem) {
  table { max-width: 100%; }
  th { white-space: normal; vertical-align: bottom; }
}
@media (max-width: 600px) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .summary { grid-template-columns: 1fr 1fr; }
  td { max-width: 13rem; }
  .tick { font-size: 21px; }
  .bars dl { grid-template-columns: 1fr; gap: 0; }
  .bars dd { margin-bottom: .6rem; }
}
@media print {
  :root {
    --paper: #fff; --ink: #000; --soft: #444; --rule: #bbb; --wash: #f3f3f3; --accent: #000;
    --s0: #0b5cad; --s1: #b8400a; --s2: #0d7355; --s3: #93359a; --s4: #7a6000; --s5: #4b5563;
  }
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav { display: none; }
  figure, tr, .summary div { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
}
"""
