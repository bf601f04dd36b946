"""The page of an evaluation's report; `report` fills in the fields between @@, with all texts escaped.

Tested with the report, in tests/infer/eval/test_evaluate.py and tests/security/test_pages.py.
"""

from dsvl2_jax.infer.content_security import content_security_policy

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="@@POLICY@@">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@TITLE@@</title>
<style>
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --text: #1c1e21; --soft: #5d6570; --line: #d9dce1;
  --right: #15803d; --wrong: #c81e1e; --partly: #a15c00; --accent: #1d4ed8; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1e2125; --text: #e6e8eb; --soft: #9aa3ae;
  --line: #353a41; --right: #4ade80; --wrong: #f87171; --partly: #fbbf24; --accent: #93b4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
.scroll { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); font-weight: 400; }
thead th { color: var(--soft); font-size: .85rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end;
  padding: .7rem 0; background: var(--back); border-bottom: 1px solid var(--line); }
.bar label { display: grid; font-size: .8rem; color: var(--soft); }
select, input, .bar button { font: inherit; font-size: 1rem; color: var(--text); background: var(--card);
  padding: .3rem .6rem; border: 1px solid var(--line); border-radius: 6px; }
.bar button:disabled { opacity: .45; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
@media (max-width: 600px) { .bar { position: static; } }
#count { margin: 0 0 .3rem auto; color: var(--soft); font-variant-numeric: tabular-nums; }
#list { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 1rem; margin-top: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--soft); border-radius: 8px;
  padding: .8rem 1rem 1rem; min-width: 0; }
article.right { border-top-color: var(--right); }
article.wrong { border-top-color: var(--wrong); }
article.partly { border-top-color: var(--partly); }
article.wide { grid-column: 1 / -1; }
article h2 { display: flex; gap: .6rem; justify-content: space-between; margin: 0 0 .6rem; font-size: .85rem;
  font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
.verdict { font-weight: 600; white-space: nowrap; }
.right .verdict { color: var(--right); } .wrong .verdict { color: var(--wrong); }
.partly .verdict { color: var(--partly); }
.images { display: flex; flex-wrap: wrap; gap: .5rem; }
.picture { position: relative; display: block; padding: 0; border: 0; background: none; cursor: zoom-in;
  max-width: 100%; }
.picture img { display: block; width: 100%; height: auto; }
.wide .picture { cursor: zoom-out; }
.box { position: absolute; display: block; pointer-events: none; }
.box.reference { border: 3px solid #22c55e; box-shadow: 0 0 0 1px #000a; }
.box.answered { border: 3px dashed #ef4444; box-shadow: 0 0 0 1px #fff6; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem .8rem; margin: .7rem 0 0; }
dt { color: var(--soft); font-size: .85rem; padding-top: .1rem; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; max-height: 16em; overflow-y: auto; }
.key { color: var(--soft); font-size: .85rem; }
.key span { display: inline-block; width: 1.2em; height: .8em; position: static; vertical-align: -1px; }
</style>
</head>
<body>
<h1>@@TITLE@@</h1>
<div class="scroll"><table>
<thead><tr><th scope="col">task</th><th scope="col">metric</th><th scope="col" class="number">samples</th>
<th scope="col" class="number">score</th><th scope="col" class="number">mean IoU</th>
<th scope="col" class="number">unanswered</th><th scope="col" class="number">malformed boxes</th></tr></thead>
<tbody>
@@ROWS@@
</tbody>
</table></div>
<noscript><p>The list of samples needs JavaScript. All of them are in results.jsonl beside this page.</p></noscript>
<p class="key">@@NOTE@@. Boxes: <span class="box reference"></span> reference,
<span class="box answered"></span> answered. A picture grows when it is chosen; ← and → turn pages.</p>
<form class="bar" role="search">
<label>task<select id="task"><option value="">all</option></select></label>
<label>result<select id="result"><option value="">all</option><option>right</option><option>partly</option>
<option>wrong</option><option>unanswered</option></select></label>
<label>text<input id="text" type="search" autocomplete="off"></label>
<button type="button" id="back">← previous</button>
<button type="button" id="next">next →</button>
<p id="count" role="status"></p>
</form>
<main id="list"></main>
<script type="application/json" id="data">@@DATA@@</script>
<script>
"use strict";
const PAGE_SIZE = 60, SHOWN_SIDE = 300;
const samples = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
let page = 0, found = samples;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const verdict = s => s.error !== undefined ? "unanswered" : s.score >= 1 ? "right" : s.score > 0 ? "partly" : "wrong";

function overlay(kind, [left, top, width, height]) {
  const box = element("span", "box " + kind);
  Object.assign(box.style, {left: left + "%", top: top + "%", width: width + "%", height: height + "%"});
  return box;
}

function picture(sample, number) {
  const [source, width, height] = sample.images[number];
  const button = element("button", "picture");
  button.type = "button";
  const what = "image " + (number + 1) + " of " + sample.images.length;
  button.setAttribute("aria-label", what + ", enlarge or reduce");
  const scale = SHOWN_SIDE / Math.max(width, height);
  button.style.width = Math.max(24, Math.round(width * scale)) + "px";
  const image = element("img");
  image.src = source;
  image.alt = what;
  image.loading = "lazy";
  image.width = width;
  image.height = height;
  button.append(image);
  if (number === sample.images.length - 1) {
    for (const box of sample.right || []) button.append(overlay("reference", box));
    for (const box of sample.answered || []) button.append(overlay("answered", box));
  }
  button.addEventListener("click", () => {
    const wide = button.closest("article").classList.toggle("wide");
    for (const other of button.parentElement.children) {
      other.style.width = parseInt(other.style.width) * (wide ? 3 : 1 / 3) + "px";
    }
  });
  return button;
}

function card(sample) {
  const kind = verdict(sample);
  const article = element("article", kind === "unanswered" ? "wrong" : kind);
  const head = element("h2");
  head.append(element("span", "", sample.id + " · " + sample.task));
  const points = kind === "partly" ? " " + (100 * sample.score).toFixed(1) + " %" : "";
  head.append(element("span", "verdict", kind + points));
  article.append(head);
  const images = element("div", "images");
  sample.images.forEach((_, number) => images.append(picture(sample, number)));
  article.append(images);
  const list = element("dl");
  const add = (name, text) => list.append(element("dt", "", name), element("dd", "", text));
  add("question", sample.question);
  if (new Set(sample.references).size === 1) add("reference", sample.references[0]);
  else add("references", sample.references.join("\\n"));
  add("answer", sample.answer);
  if (sample.iou !== undefined) add("IoU", sample.iou.toFixed(3));
  if (sample.error !== undefined) add("unanswered", sample.error);
  article.append(list);
  return article;
}

function show() {
  const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  page = Math.min(Math.max(page, 0), pages - 1);
  at("list").replaceChildren(...found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE).map(card));
  at("count").textContent = found.length.toLocaleString("en") + " samples, page " + (page + 1) + " of " + pages;
  at("back").disabled = page === 0;
  at("next").disabled = page === pages - 1;
}

function filter() {
  const task = at("task").value, result = at("result").value, text = at("text").value.toLowerCase();
  found = samples.filter(s => (!task || s.task === task) && (!result || verdict(s) === result) &&
    (!text || [s.id, s.question, s.answer, ...s.references].some(part => part.toLowerCase().includes(text))));
  page = 0;
  show();
}

function turn(pages) {
  page += pages;
  show();
  at("list").scrollIntoView();
}

for (const task of new Set(samples.map(s => s.task))) {
  const option = element("option", "", task);
  option.value = task;
  at("task").append(option);
}
for (const id of ["task", "result", "text"]) at(id).addEventListener("input", filter);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
at("back").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
document.addEventListener("keydown", event => {
  if (event.target.closest("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft" && !at("back").disabled) turn(-1);
  if (event.key === "ArrowRight" && !at("next").disabled) turn(1);
});
filter();
</script>
</body>
</html>
"""

# Thumbnails lie beside the page, which is a file or on a web server.
POLICY = content_security_policy(PAGE, img_src="'self' file:")
