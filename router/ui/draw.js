// Everything that is drawn: the flow between nodes, the charts, and the bars of requests. Text from the cluster only ever becomes
// text: no function here reads markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; `text` is its text, `data` its data attributes. */
export function make(tag, attributes = {}, ...children) {
  const svg = attributes.svg;
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "svg" || value === undefined || value === null) continue;
    if (name === "text") element.textContent = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const draw = (tag, attributes, ...children) => make(tag, { svg: true, ...attributes }, ...children);

/** Keeps one child of `parent` per item, in order, so that focus and animations outlive an update. */
export function keyed(parent, items, key, create, update) {
  const known = parent.kept ?? (parent.kept = new Map());
  const wanted = new Set();
  let place = parent.firstChild;
  for (const item of items) {
    const name = key(item);
    if (wanted.has(name)) continue;
    wanted.add(name);
    let child = known.get(name);
    if (!child) known.set(name, (child = create(item)));
    update(child, item);
    if (child === place) place = place.nextSibling;
    else parent.insertBefore(child, place);
  }
  for (const [name, child] of known) {
    if (!wanted.has(name)) {
      child.remove();
      known.delete(name);
    }
  }
}

// Numbers for people.

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  return value >= 1e6 ? `${(value / 1e6).toFixed(1)}M` : grouped.format(value);
}

export function time(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${ms.toFixed(ms < 1 ? 2 : 1)} ms`;
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < 59950) return `${(ms / 1e3).toFixed(ms < 9950 ? 2 : 1)} s`;
  const seconds = Math.round(ms / 1e3);
  return `${Math.floor(seconds / 60)}m ${String(seconds % 60).padStart(2, "0")}s`;
}

export function bytes(value) {
  let unit = 0;
  while (value >= 1000 && unit < 4) {
    value /= 1000;
    unit += 1;
  }
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

export function rate(perSecond) {
  if (perSecond === 0) return "0";
  return perSecond < 10 ? perSecond.toFixed(1) : count(perSecond);
}

// The flow.

const CARD = { width: 168, height: 58, gap: 12 };
/** Cards of a kind; of more, the busiest are drawn, and the title tells how many there are. */
const CARDS_MAX = 6;
/** A card needs so much for its two lines of text, with the gap below it. */
const STEP_MIN = 46;
/** Room below the middle column for what goes past it. */
const LANE = 20;
const ROLES = ["prefill", "decode", "store"];

/** Narrower than this, kinds of nodes stand below each other. */
const NARROW = 620;

/** Draws nodes and what moves between them into `svg`. */
export function flow(svg, snapshot) {
  const width = Math.max(svg.clientWidth, 280);
  const narrow = width < NARROW;
  const places = narrow ? stacked(snapshot, width) : layout(snapshot, width, Math.max(svg.clientHeight, 200));
  svg.style.height = narrow ? `${places.height}px` : "";
  svg.setAttribute("viewBox", `0 0 ${width} ${places.height}`);
  svg.layers ??= layers(svg);
  const { links, cards, labels } = svg.layers;
  keyed(cards, places.cards, (card) => card.id, createCard, updateCard);
  const shown = snapshot.links.filter((link) => places.at.has(link.from) && places.at.has(link.to));
  const ways = shown.map((link) => {
    const [from, to] = [places.at.get(link.from), places.at.get(link.to)];
    return { ...link, from, to, lane: to.column - from.column > 1 ? places.lane : null, name: `${link.from}→${link.to}`, source: link.from };
  });
  keyed(links, ways, (way) => way.name, createLink, updateLink);
  keyed(labels, ways.filter((way) => label(way)), (way) => way.name, () => draw("text", { class: "rate", "text-anchor": "middle" }), (text, way) => {
    text.textContent = label(way);
    // Nearer to where it goes, so that labels of ways from one node lie apart.
    const [from, to] = [way.from.out, way.to.in];
    const { lane } = way;
    text.setAttribute("x", lane ? (lane.left + lane.right) / 2 : from.x + (to.x - from.x) * 0.56);
    text.setAttribute("y", lane ? lane.y + 4 : from.y + (to.y - from.y) * 0.56 + (narrow ? 4 : -5));
  });
  keyed(svg.layers.titles, places.titles, (title) => title.text, () => draw("text", { class: "column" }), (text, title) => {
    text.textContent = title.text;
    text.setAttribute("x", title.x);
    text.setAttribute("y", title.y);
  });
}

function layers(svg) {
  const groups = { links: draw("g"), titles: draw("g"), cards: draw("g"), labels: draw("g") };
  svg.replaceChildren(...Object.values(groups));
  return groups;
}

function layout(snapshot, width, height) {
  const by = (role) => snapshot.nodes.filter((node) => node.role === role);
  const columns = [[{ id: "", role: "router", snapshot }], by("prefill"), by("decode")];
  const stores = by("store");
  const card = { ...CARD, width: Math.min(CARD.width, Math.floor((width - 120) / 3)) };
  const at = new Map();
  const cards = [];
  const titles = [];
  let lane = null;
  columns.forEach((nodes, column) => {
    const x = Math.round((column * (width - card.width)) / 2);
    // Stores feed the prefill nodes' caches, so they stand below them.
    const below = column === 1 ? stores : [];
    const groups = [nodes, below].filter((group) => group.length);
    const room = height - 18 * groups.length - (column === 1 ? LANE : 0);
    const most = Math.max(groups.length, Math.floor(room / STEP_MIN));
    // Stores are the less interesting ones.
    const kept = groups.length > 1 ? Math.min(2, groups[1].length) : 0;
    const places = groups.map((group, index) => Math.min(group.length, CARDS_MAX, Math.max(1, index ? Math.max(kept, most - groups[0].length) : most - kept)));
    const rows = places.reduce((sum, rows) => sum + rows, 0);
    const step = Math.min(card.height + card.gap, room / Math.max(rows, 1));
    const tall = Math.min(card.height, Math.max(step - 5, 30));
    let y = Math.max(0, (room - rows * step) / 2);
    if (column === 1) lane = { left: x, right: x + card.width, y: Math.min(height - 8, y + rows * step + 18 * groups.length + 6) };
    groups.forEach((group, index) => {
      const role = group[0].role;
      if (role !== "router") titles.push({ text: titled(group, places[index]), x, y: y + 11 });
      y += 18;
      busiest(group, places[index]).forEach((node) => {
        at.set(node.id, { column, in: { x, y: y + tall / 2 }, out: { x: x + card.width, y: y + tall / 2 } });
        cards.push({ id: node.id, node, snapshot, x, y, width: card.width, height: tall });
        y += step;
      });
    });
  });
  return { at, cards, titles, height, lane };
}

/** Two cards in a row, for phones. */
function stacked(snapshot, width) {
  const by = (role) => snapshot.nodes.filter((node) => node.role === role);
  const groups = [[{ id: "", role: "router", snapshot }], ...ROLES.map(by)].filter((group) => group.length);
  const wide = Math.floor((width - CARD.gap) / 2);
  const at = new Map();
  const cards = [];
  const titles = [];
  let y = 0;
  for (const group of groups) {
    const isRouter = group[0].role === "router";
    if (!isRouter) titles.push({ text: titled(group, CARDS_MAX), x: 0, y: y + 8 });
    y += isRouter ? 0 : 16;
    busiest(group, CARDS_MAX).forEach((node, index) => {
      const x = isRouter ? (width - wide) / 2 : (index % 2) * (wide + CARD.gap);
      const top = y + Math.floor(index / 2) * (CARD.height + CARD.gap);
      at.set(node.id, { in: { x: x + wide / 2, y: top }, out: { x: x + wide / 2, y: top + CARD.height } });
      cards.push({ id: node.id, node, snapshot, x, y: top, width: wide, height: CARD.height });
    });
    y += Math.ceil(Math.min(group.length, CARDS_MAX) / 2) * (CARD.height + CARD.gap) + 26;
  }
  return { at, cards, titles, height: y - 26 };
}

/** Those of a group that are drawn. */
function busiest(group, most) {
  if (group.length <= most) return group;
  const load = (node) => node.running + node.queued;
  return [...group].sort((a, b) => load(b) - load(a) || (a.id < b.id ? -1 : 1)).slice(0, most);
}

function titled(group, most) {
  const { role } = group[0];
  return group.length > most ? `${role} · busiest ${most} of ${group.length}` : role;
}

function createCard({ node }) {
  const role = node.role;
  return draw("g", {},
    draw("title"),
    draw("rect", { class: "card", rx: 10 }),
    draw("rect", { class: `stripe ${role}`, width: 4, rx: 2 }),
    draw("circle", { class: "state", r: 3.5 }),
    draw("text", { class: "name", "font-weight": 600 }),
    draw("text", { class: "muted load" }),
    draw("g", { class: "memory" }));
}

function updateCard(group, card) {
  const { node, x, y, width, height, snapshot } = card;
  const isRouter = node.role === "router";
  group.setAttribute("transform", `translate(${x} ${y})`);
  const [title, box, stripe, state, name, load, memory] = group.children;
  box.setAttribute("width", width);
  box.setAttribute("height", height);
  stripe.setAttribute("y", 8);
  stripe.setAttribute("x", 0);
  stripe.setAttribute("height", height - 16);
  state.setAttribute("cx", width - 13);
  state.setAttribute("cy", 16);
  state.dataset.state = isRouter ? "ready" : node.state;
  name.setAttribute("x", 14);
  name.setAttribute("y", 20);
  name.textContent = fit(isRouter ? snapshot.router : node.id, width - 40);
  load.setAttribute("x", 14);
  load.setAttribute("y", 36);
  const running = isRouter ? snapshot.running : node.running;
  const queued = isRouter ? snapshot.waiting : node.queued;
  const words = isRouter
    ? `${count(running)} running · ${count(queued)} waiting`
    : node.role === "store" ? `${count(node.kv_cached + node.kv_used)} blocks`
    : node.role === "prefill" ? `${count(queued)} queued${node.prefill_tokens_per_s ? ` · ${count(node.prefill_tokens_per_s)} tok/s` : ""}`
    : `${count(running)} running${queued ? ` · ${count(queued)} queued` : ""}`;
  load.textContent = node.state && node.state !== "ready" ? node.state : fit(words, width - 20);
  title.textContent = isRouter ? words : `${node.id}: ${node.state}, ${words}, KV ${node.kv_used} in use, ${node.kv_cached} cached of ${node.kv_blocks} blocks` + (node.disk_blocks ? `, disk ${node.disk_used} of ${node.disk_blocks}` : "");
  if (isRouter || height < 52) {
    memory.replaceChildren();
    return;
  }
  const inner = width - 28;
  const tiers = [[["used", node.kv_used], ["cached", node.kv_cached], node.kv_blocks]];
  if (node.disk_blocks) tiers.push([["disk", node.disk_used], ["", 0], node.disk_blocks]);
  const thick = tiers.length > 1 ? 4 : 6;
  memory.replaceChildren(...tiers.flatMap(([first, second, all], tier) => {
    const top = 43 + tier * 6;
    const part = (value) => (all ? Math.min(inner, (value / all) * inner) : 0);
    const bars = [draw("rect", { class: "track", x: 14, y: top, width: inner, height: thick, rx: thick / 2 })];
    let from = 14;
    for (const [kind, value] of [first, second]) {
      const long = part(value);
      if (long > 0) bars.push(draw("rect", { class: kind, x: from, y: top, width: Math.max(long, 2), height: thick, rx: thick / 2 }));
      from += long;
    }
    return bars;
  }));
}

/** Some 6.6 units per character at the size of the cards' text. */
function fit(text, width) {
  const most = Math.max(4, Math.floor(width / 6.4));
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

function createLink(way) {
  const kind = way.source === "" ? "router" : "prefill";
  return draw("g", {}, draw("path", { class: "link" }), draw("path", { class: `pulse ${kind}` }));
}

function updateLink(group, way) {
  const [from, to] = [way.from.out, way.to.in];
  // Leaves and arrives at a right angle to the cards, which stand beside each other or below.
  const [a, b] = way.from.in.y === from.y
    ? [`${(from.x + to.x) / 2} ${from.y}`, `${(from.x + to.x) / 2} ${to.y}`]
    : [`${from.x} ${(from.y + to.y) / 2}`, `${to.x} ${(from.y + to.y) / 2}`];
  const path = way.lane ? around(from, way.lane, to) : `M${from.x} ${from.y}C${a} ${b} ${to.x} ${to.y}`;
  const active = way.running > 0 || way.requests_per_s > 0;
  const strength = 1.4 + Math.min(6, Math.log2(1 + way.requests_per_s) + Math.log10(1 + way.bytes_per_s / 1e4));
  group.classList.toggle("active", active);
  for (const line of group.children) line.setAttribute("d", path);
  group.children[0].setAttribute("stroke-width", active ? strength : 1.2);
  group.children[1].setAttribute("stroke-width", Math.max(2, strength * 0.8));
}

/** From one side to the other past the column between them. */
function around(from, lane, to) {
  const [into, out] = [(from.x + lane.left) / 2, (lane.right + to.x) / 2];
  return `M${from.x} ${from.y}C${into} ${from.y} ${into} ${lane.y} ${lane.left} ${lane.y}H${lane.right}C${out} ${lane.y} ${out} ${to.y} ${to.x} ${to.y}`;
}

function label(way) {
  if (way.bytes_per_s > 0) return `${bytes(way.bytes_per_s)}/s`;
  if (way.requests_per_s > 0) return `${rate(way.requests_per_s)} req/s`;
  return "";
}

// The charts. Each is drawn in a box of 100 by 40 that is stretched to its place.

const WIDE = 100;
const HIGH = 40;

/** Stacked bars: `series` is a list of [class, values]. */
export function bars(svg, series, names) {
  const length = series[0][1].length;
  const sums = Array.from({ length }, (_, at) => series.reduce((sum, [, values]) => sum + values[at], 0));
  const most = Math.max(1, ...sums);
  const step = WIDE / length;
  const shapes = [axis()];
  for (let at = 0; at < length; at += 1) {
    let y = HIGH;
    for (const [kind, values] of series) {
      const high = (values[at] / most) * (HIGH - 2);
      if (high > 0) shapes.push(draw("rect", { class: kind, x: at * step + step * 0.08, y: y - high, width: step * 0.84, height: high }));
      y -= high;
    }
  }
  finish(svg, shapes, names);
}

/** Lines: a value may be null, where there is none and the line stops. */
export function lines(svg, series, names, area = false) {
  const most = Math.max(1e-9, ...series.flatMap(([, values]) => values.filter((value) => value !== null)));
  const shapes = [axis()];
  for (const [kind, values] of series) {
    const x = (at) => (values.length > 1 ? (at / (values.length - 1)) * WIDE : 0);
    const y = (value) => HIGH - 1 - (value / most) * (HIGH - 4);
    let path = "";
    let open = false;
    values.forEach((value, at) => {
      if (value === null) {
        open = false;
        return;
      }
      // A value on its own is a short line, or it would not be seen.
      path += `${open ? "L" : "M"}${x(at).toFixed(2)} ${y(value).toFixed(2)}`;
      if (!open && values[at + 1] === null) path += `h1`;
      open = true;
    });
    if (area && path) shapes.push(draw("path", { class: "area", d: `${path}L${WIDE} ${HIGH}L0 ${HIGH}z` }));
    shapes.push(draw("path", { class: `line ${kind}`, d: path }));
  }
  finish(svg, shapes, names);
  return most;
}

function axis() {
  return draw("line", { class: "axis", x1: 0, x2: WIDE, y1: HIGH - 0.5, y2: HIGH - 0.5 });
}

function finish(svg, shapes, names) {
  svg.setAttribute("viewBox", `0 0 ${WIDE} ${HIGH}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", names);
  svg.replaceChildren(...shapes);
}

// The bars of a request.

const SHOWN = new Set(["queue", "fetch", "prefill", "handoff", "verify", "decode", "admission"]);

/** The whole way on one line. */
export function way(track, request) {
  const parts = request.parts.filter((part) => SHOWN.has(part.name));
  track.replaceChildren(...parts.map((part) => bar(part, request.age_ms)));
}

/** One part as a bar within `total` milliseconds. */
export function bar(part, total) {
  const element = make("span", { class: `bar ${known(part.name)}${part.running ? " running" : ""}`, title: `${part.name}${part.node ? ` on ${part.node}` : ""}: ${time(part.duration_ms)}` });
  const scale = 100 / Math.max(total, 1e-6);
  element.style.left = `${Math.min(99.5, part.start_ms * scale)}%`;
  element.style.width = `${Math.min(100, part.duration_ms * scale)}%`;
  return element;
}

const NAMES = new Set([...SHOWN, "request", "placement", "call", "place", "tokenise"]);

/** A class only for names that we know: a node of another version may tell anything. */
function known(name) {
  return NAMES.has(name) ? name : "queue";
}
