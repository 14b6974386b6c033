// The live page: takes a snapshot of the cluster twice a second and shows it.

import { bar, bars, bytes, count, flow, keyed, lines, make, rate, time, way } from "/ui/draw.js";

const find = (id) => document.getElementById(id);
/** Without news for so long, the router counts as lost. */
const SILENCE_MAX_MS = 3000;

let latest = null;
let heardAt = 0;

// Light and dark: the system's wish, until somebody chooses.

const dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme() {
  const chosen = localStorage.getItem("perigee-theme");
  document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
}
dark.addEventListener("change", setTheme);
find("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("perigee-theme", next);
  setTheme();
});
setTheme();

// What is new.

const events = new EventSource("/ui/events");
events.addEventListener("message", (event) => {
  latest = JSON.parse(event.data);
  heardAt = performance.now();
  connection("live", "live");
  show(latest);
});
events.addEventListener("error", () => connection("lost", "connecting again"));
setInterval(() => {
  if (latest && performance.now() - heardAt > SILENCE_MAX_MS) connection("lost", "no news");
}, 1000);
addEventListener("resize", () => latest && flow(find("flow"), latest));

function connection(state, text) {
  const pill = find("connection");
  if (pill.dataset.state === state && pill.textContent === text) return;
  pill.dataset.state = state;
  pill.textContent = text;
}

function show(snapshot) {
  find("model").textContent = snapshot.model;
  find("router").textContent = `${snapshot.router} ${snapshot.version}`;
  find("policy").textContent = snapshot.policy;
  tiles(snapshot);
  flow(find("flow"), snapshot);
  charts(snapshot.steps);
  requests(snapshot.requests);
  heat(snapshot);
}

// Tiles.

const sum = (values) => values.reduce((total, value) => total + value, 0);
const last = (values, many) => values.slice(-many);

/** Per second over the last complete steps. */
function perSecond(values, step) {
  const recent = last(values, 4).slice(0, 3);
  return recent.length ? sum(recent) / (recent.length * step) : 0;
}

function newest(values) {
  return values.findLast((value) => value !== null) ?? null;
}

function tiles(snapshot) {
  const { steps } = snapshot;
  const met = sum(steps.slo_met);
  const judged = met + sum(steps.slo_missed);
  const rejected = sum(steps.rejected);
  const failed = sum(steps.failed);
  const prompt = sum(steps.prompt_tokens);
  const attained = judged ? (100 * met) / judged : null;
  const [p50, p95] = [newest(steps.ttft_p50_ms), newest(steps.ttft_p95_ms)];
  const list = [
    ["Running", count(snapshot.running)],
    ["Waiting", count(snapshot.waiting)],
    ["Answered", rate(perSecond(steps.finished, steps.step_s)), "/s"],
    ["Tokens out", rate(perSecond(steps.tokens, steps.step_s)), "/s"],
    ["First token p50, p95", time(p50), p95 === null ? "" : time(p95)],
    ["SLO attained", attained === null ? "–" : `${attained.toFixed(attained > 99.9 || attained === 0 ? 0 : 1)}`, attained === null ? "" : "%", attained === null ? "" : attained < 90 ? "bad" : "ok"],
    ["Rejected, failed", `${count(rejected)}, ${count(failed)}`, "in 5 min", rejected + failed ? "bad" : ""],
    ["Prompt from cache", prompt ? `${((100 * sum(steps.cached_tokens)) / prompt).toFixed(0)}` : "–", prompt ? "%" : ""],
  ];
  keyed(find("tiles"), list, ([name]) => name, ([name]) => make("div", { class: "tile" }, make("span", { text: name }), make("strong")), (tile, [, value, unit = "", level = ""]) => {
    tile.dataset.level = level;
    tile.lastChild.replaceChildren(value, ...(unit ? [make("small", { text: unit })] : []));
  });
}

// Charts.

/** Sums of `many` values each, so that a bar is wide enough to be seen. */
function grouped(values, many) {
  const groups = [];
  for (let at = values.length % many; at < values.length; at += many) groups.push(sum(values.slice(at, at + many)));
  return groups;
}

/** As long as five minutes even where the router is younger. */
function padded(values, length, filler) {
  return [...Array(Math.max(0, length - values.length)).fill(filler), ...values];
}

const STEPS = 150;

function chart(id, title) {
  let element = find(id);
  if (!element) {
    element = make("div", { class: "chart", id }, make("h3", { text: title }), make("p"), make("svg", { svg: true }));
    find("charts").append(element);
  }
  return element;
}

function note(element, ...pairs) {
  const shown = pairs.filter(([, value]) => value !== null);
  element.children[1].replaceChildren(...shown.map(([name, value, kind], at) => make("span", { class: `note-${kind || "plain"}` }, at ? " · " : "", name && `${name} `, make("b", { class: kind, text: value }))));
}

function charts(steps) {
  const many = 3;
  const column = (values) => grouped(padded(values, STEPS, 0), many);
  const outcomes = chart("chart-outcomes", "Outcomes");
  const [met, missed] = [column(steps.slo_met), column(steps.slo_missed)];
  const answered = column(steps.finished).map((value, at) => Math.max(0, value - met[at] - missed[at]));
  const series = [["met", met], ["answered", answered], ["missed", missed], ["rejected", column(steps.rejected)], ["failed", column(steps.failed)]];
  const words = { met: "in SLO", answered: "no SLO", missed: "late", rejected: "rejected", failed: "failed" };
  bars(outcomes.children[2], series, `Requests by outcome over five minutes: ${series.map(([kind, values]) => `${sum(values)} ${words[kind]}`).join(", ")}`);
  const some = series.filter(([, values]) => sum(values) > 0).map(([kind, values]) => ["", `${count(sum(values))} ${words[kind]}`, kind]);
  note(outcomes, ...(some.length ? some : [["none yet", "", ""]]));

  const first = chart("chart-ttft", "Time to first token");
  const [p50, p95] = [padded(steps.ttft_p50_ms, STEPS, null), padded(steps.ttft_p95_ms, STEPS, null)];
  const most = lines(first.children[2], [["p95", p95], ["p50", p50]], `Time to first token over five minutes: median ${time(newest(p50))}, 95th percentile ${time(newest(p95))}`);
  const none = newest(p50) === null;
  note(first, ["median", none ? null : time(newest(p50)), "p50"], ["p95", none ? null : time(newest(p95)), "p95"], ["scale to", none ? null : time(most), "scale"]);

  const tokens = chart("chart-tokens", "Tokens per second");
  // The last step is not complete.
  const speed = padded(steps.tokens.slice(0, -1), STEPS, 0).map((value) => value / steps.step_s);
  lines(tokens.children[2], [["tokens", speed]], `Tokens per second over five minutes: now ${rate(speed.at(-1))}`, true);
  note(tokens, ["now", rate(speed.at(-1)), ""], ["most", rate(Math.max(...speed)), ""]);
}

// Requests.

function requests(list) {
  find("no-requests").hidden = list.length > 0;
  keyed(find("requests"), list, (request) => `${request.id} ${request.arrived_unix_ms}`, createRow, updateRow);
}

function createRow(request) {
  const cells = ["id", "", "number", "number wide", "number middle", "number", "wide", "way"].map((kind) => make("td", { class: kind }));
  cells[0].textContent = request.id.slice(0, 8);
  cells[1].append(make("span", { class: "state" }));
  cells[7].append(make("span", { class: "bars" }));
  const row = make("tr", { tabindex: 0, "aria-label": `Request ${request.id.slice(0, 8)}: show its way` }, ...cells);
  row.addEventListener("click", () => open(request.id));
  row.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open(request.id);
    }
  });
  return row;
}

function updateRow(row, request) {
  const [, state, prompt, cached, output, ttft, nodes, track] = row.children;
  state.firstChild.textContent = request.state;
  state.firstChild.dataset.state = request.state;
  prompt.textContent = request.prompt_tokens ? count(request.prompt_tokens) : "–";
  cached.textContent = request.cached_tokens ? count(request.cached_tokens) : "–";
  output.textContent = count(request.output_tokens);
  ttft.textContent = time(request.ttft_ms);
  nodes.textContent = between(request);
  // What has ended stays as it is.
  if (request.running || !row.drawn) {
    way(track.firstChild, request);
    row.drawn = !request.running;
  }
}

function between(request) {
  if (!request.decode) return "–";
  const again = request.placements > 1 ? ` (${request.placements}×)` : "";
  return (request.prefill ? `${request.prefill} → ${request.decode}` : `${request.decode} alone`) + again;
}

// Prefixes.

function heat(snapshot) {
  const place = find("heat");
  const hottest = Math.max(1e-6, ...snapshot.prefixes.map((prefix) => prefix.heat));
  const shown = snapshot.prefixes.filter((prefix) => prefix.tokens > 0);
  let empty = find("no-heat");
  if (!empty) place.before((empty = make("p", { class: "empty", id: "no-heat", text: "Prompts of at least one full block show here by what they begin with." })));
  empty.hidden = shown.length > 0;
  keyed(place, shown, (prefix) => prefix.id, createPrefix, (element, prefix) => {
    const [facts, cells] = element.children;
    const [name, words, glow] = facts.children;
    name.firstChild.textContent = prefix.id;
    name.lastChild.textContent = prefix.tenant;
    words.textContent = `${count(prefix.requests)} request${prefix.requests === 1 ? "" : "s"}, ${count(prefix.shared_tokens)} tokens`;
    glow.firstChild.style.width = `${Math.max(2, (100 * prefix.heat) / hottest)}%`;
    keyed(cells, prefix.holders, (holder) => holder.node, createHolder, (cell, holder) => {
      const [fill, label] = cell.children;
      const part = (tokens) => `${Math.min(100, (100 * tokens) / prefix.tokens)}%`;
      fill.children[0].style.width = part(holder.memory_tokens);
      fill.children[1].style.width = part(holder.disk_tokens);
      label.textContent = holder.node;
      cell.title = `${holder.node}: ${count(holder.memory_tokens)} of ${count(prefix.tokens)} tokens in memory, ${count(holder.disk_tokens)} on disk`;
    });
  });
}

function createPrefix() {
  const facts = make("div", {}, make("p", {}, make("code"), " ", make("span")), make("p"), make("span", { class: "glow" }, make("i")));
  return make("div", { class: "prefix" }, facts, make("div", { class: "cells" }));
}

function createHolder() {
  return make("div", { class: "cell" }, make("div", { class: "fill" }, make("i", { class: "memory" }), make("i", { class: "disk" })), make("span"));
}

// One request.

const detail = find("detail");
let watched = null;

async function open(id) {
  watched = id;
  await refresh();
  if (watched !== id) return;
  history.replaceState(null, "", `#${id}`);
  if (!detail.open) detail.showModal();
}
detail.addEventListener("close", () => {
  watched = null;
  history.replaceState(null, "", location.pathname);
});
// An address may name a request, so that one can be shown to others.
function openNamed() {
  const id = location.hash.slice(1);
  if (/^[0-9a-f]{32}$/.test(id)) open(id);
}
addEventListener("hashchange", openNamed);
openNamed();
// A click beside the dialog closes it.
detail.addEventListener("click", (event) => event.target === detail && detail.close());
setInterval(() => detail.open && watched && detail.running && refresh(), 1000);

async function refresh() {
  const id = watched;
  const answer = await fetch(`/ui/requests/${encodeURIComponent(id)}`).catch(() => null);
  if (watched !== id) return;
  if (!answer?.ok) {
    detail.running = false;
    find("detail-title").textContent = `Request ${id} is not kept any more`;
    return;
  }
  showDetail(await answer.json());
}

function showDetail(request) {
  detail.running = request.running;
  find("detail-title").textContent = `Request ${request.id}`;
  const facts = [
    ["state", request.state + (request.error ? `: ${request.error}` : "")],
    [request.running ? "age" : "took", time(request.age_ms)],
    ["tokens", `${count(request.prompt_tokens)} in (${count(request.cached_tokens)} cached), ${count(request.output_tokens)} of ${count(request.output_tokens_max)} out`],
    ["first token", time(request.ttft_ms)],
    ["between tokens", request.tbt_ms ? time(request.tbt_ms) : "–"],
    ["SLO", request.slo_met === null ? "none asked" : request.slo_met ? "met" : "missed"],
    ["tenant", request.tenant || "common"],
    ["trace", request.trace_id],
  ];
  find("detail-facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
  find("detail-way").replaceChildren(...request.parts.map((part) => {
    const name = make("span", { class: "name", text: part.name });
    name.style.setProperty("--depth", part.depth);
    const track = make("span", { class: "bars" }, bar(part, request.age_ms));
    const row = make("div", { class: "row" }, name, make("span", { class: "where", text: part.node || "router" }), make("span", { class: "took", text: time(part.duration_ms) + (part.running ? " …" : "") }), track);
    const more = [part.bytes ? bytes(part.bytes) : "", part.detail].filter(Boolean).join(", ");
    if (more && part.name !== "placement") row.append(make("span", { class: "note", text: more }));
    return row;
  }));
}
