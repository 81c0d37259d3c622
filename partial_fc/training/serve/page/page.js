"use strict";
// The page of the service: an image -> /api/search, two images -> /api/compare, /api/duplicates. Pictures are fetched
// like everything else, because a token travels in a header. Text from the service is only ever set as text.

const byId = (id) => document.getElementById(id);
let status = null;
let turn = 0; // of the newest search: answers to earlier ones are not shown

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    byId("token").hidden = false;
    byId("token-text").focus();
  }
  const said = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(said.error || `The service answers with status ${answer.status}.`), { status: answer.status });
}

function complain(error) {
  byId("error").textContent = error ? error.message : "";
  byId("error").hidden = !error;
}

function attempt(work) {
  complain(null);
  return work().catch(complain);
}

async function picture(path, alt) {
  const image = make("img", { className: "picture", alt });
  if (path) {
    try {
      const address = URL.createObjectURL(await (await ask(path)).blob());
      image.onload = image.onerror = () => URL.revokeObjectURL(address);
      image.src = address;
      return image;
    } catch { /* a picture that is gone is left out */ }
  }
  return make("div", { className: "picture", role: "img", ariaLabel: `no picture of ${alt}` });
}

const number = (cosine) => cosine.toFixed(3);
const count = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const percent = (cosine) => `${100 * Math.min(1, Math.max(0, cosine))}%`;

function bar(cosine, threshold) {
  const above = threshold !== null && cosine >= threshold;
  const value = make("div", { className: above ? "value above" : "value" });
  value.style.width = percent(cosine);
  const whole = make("div", { className: "bar" }, value);
  if (threshold !== null) {
    const mark = make("div", { className: "threshold", title: `threshold ${number(threshold)}` });
    mark.style.left = percent(threshold);
    whole.append(mark);
  }
  return whole;
}

// ---------------------------------------------------------------------------------------------------- images

function checked(file) {
  if (!file) throw new Error("That is not a file; drop or choose an image.");
  if (status && file.size > status.limits.bytes) {
    throw new Error(`The image has ${file.size.toLocaleString("en")} bytes; at most ${status.limits.bytes.toLocaleString("en")} are taken.`);
  }
  return file;
}

function preview(zone, file) {
  zone.querySelector("img")?.remove();
  const image = make("img", { alt: "the image to search" });
  const address = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(address);
  image.onerror = () => { URL.revokeObjectURL(address); image.remove(); };
  image.src = address;
  zone.prepend(image);
  zone.querySelector("span").textContent = file.name || "pasted image";
}

function zone(name, use) {
  const drop = byId(`${name}-drop`);
  const input = byId(`${name}-file`);
  const take = (file) => attempt(async () => { checked(file); preview(drop, file); await use(file); });
  input.addEventListener("change", () => { if (input.files.length) take(input.files[0]); input.value = ""; });
  drop.addEventListener("dragover", () => drop.classList.add("over"));
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  return take;
}

// a file that misses the zone must not replace the page
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());

// ---------------------------------------------------------------------------------------------------- search

let searched = null;

async function search(file) {
  const mine = ++turn;
  searched = null;
  byId("enrol").hidden = true;
  byId("found").replaceChildren(make("p", { className: "dim", textContent: "Searching …" }));
  try {
    const form = new FormData();
    form.append("image", file);
    const found = await (await ask("/api/search?k=5", { method: "POST", body: form })).json();
    const shown = await results(found);
    if (mine !== turn) return;
    byId("found").replaceChildren(...shown);
    searched = file;
    byId("enrol").hidden = !status?.writable;
  } catch (error) {
    if (mine !== turn) return;
    byId("found").replaceChildren();
    throw error;
  }
}

async function results(found) {
  const best = found.matches[0];
  const answer = found.threshold === null && best
    ? make("p", { className: "answer", textContent: best.identity })
    : make("p", { className: `answer ${found.answer === null ? "no" : "yes"}`, textContent: found.answer ?? "nobody" });
  const text = !best ? "The gallery is empty."
    : found.threshold === null ? `The nearest identity, with cosine ${number(best.cosine)}. The gallery has no threshold, so it may be somebody else.`
    : `Cosine ${number(best.cosine)} of the nearest identity; the threshold is ${number(found.threshold)}.`;
  const list = make("ol", { id: "matches" });
  for (const match of found.matches) {
    const words = make("div", {}, make("div", { className: "name", textContent: match.identity }),
      make("div", { className: "dim", textContent: `cosine ${number(match.cosine)}` }), bar(match.cosine, found.threshold));
    list.append(make("li", { className: "match" }, await picture(match.picture, match.identity), words));
  }
  return [answer, make("p", { className: "dim", textContent: text }), list];
}

byId("enrol").addEventListener("submit", (event) => {
  event.preventDefault();
  if (searched) attempt(async () => {
    const form = new FormData();
    form.append("identity", byId("enrol-name").value);
    form.append("existing", byId("enrol-extend").checked ? "extend" : "refuse");
    form.append("image", searched);
    await ask("/api/identities", { method: "POST", body: form });
    byId("enrol-name").value = "";
    await load();
    await search(searched);
  });
});

// ---------------------------------------------------------------------------------------------------- compare

const pair = {};

async function compare(side, file) {
  pair[side] = file;
  if (!pair.first || !pair.second) return;
  const mine = ++turn;
  byId("compared").replaceChildren(make("p", { className: "dim", textContent: "Comparing …" }));
  try {
    const form = new FormData();
    form.append("first", pair.first);
    form.append("second", pair.second);
    const found = await (await ask("/api/compare", { method: "POST", body: form })).json();
    if (mine !== turn) return;
    const answer = found.same === null ? `cosine ${number(found.cosine)}` : found.same ? "the same identity" : "not the same identity";
    const kind = found.same === null ? "" : found.same ? " yes" : " no";
    const text = found.threshold === null ? "The gallery has no threshold to compare it with."
      : `Cosine ${number(found.cosine)}; the threshold is ${number(found.threshold)}.`;
    byId("compared").replaceChildren(make("p", { className: `answer${kind}`, textContent: answer }),
      make("p", { className: "dim", textContent: text }), bar(found.cosine, found.threshold));
  } catch (error) {
    if (mine !== turn) return;
    byId("compared").replaceChildren();
    throw error;
  }
}

// ---------------------------------------------------------------------------------------------------- duplicates

async function side(each) {
  const pictures = await Promise.all(each.pictures.map((path) => picture(path, each.identity)));
  return make("div", {}, make("div", { className: "name", textContent: each.identity }),
    make("div", { className: "dim", textContent: count(each.images, "image", "images") }), make("div", { className: "row" }, ...pictures));
}

async function more() {
  const shown = byId("pairs").children.length;
  const found = await (await ask(`/api/duplicates?offset=${shown}&limit=10`)).json();
  for (const each of found.pairs) {
    const cosines = [["of class rows", each.row_cosine], ["of mean images", each.mean_cosine]].filter(([, value]) => value !== null);
    byId("pairs").append(make("li", {}, make("div", { className: "two" }, await side(each.a), await side(each.b)),
      make("p", { className: "dim", textContent: `cosine ${cosines.map(([what, value]) => `${what} ${number(value)}`).join(", ")}` })));
  }
  byId("more").hidden = byId("pairs").children.length >= found.total;
}

byId("more").addEventListener("click", () => attempt(more));

// ---------------------------------------------------------------------------------------------------- the page

const zones = {
  search: zone("search", search),
  first: zone("first", (file) => compare("first", file)),
  second: zone("second", (file) => compare("second", file)),
};

document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (!file) return;
  if (!byId("search").hidden) zones.search(file);
  else if (!byId("compare").hidden) zones[pair.first ? "second" : "first"](file);
});

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab) {
  complain(null);
  for (const each of tabs) {
    each.setAttribute("aria-selected", String(each === tab));
    byId(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
  if (tab.id === "tab-duplicates" && !byId("pairs").children.length) attempt(more);
}

for (const tab of tabs) tab.addEventListener("click", () => show(tab));

async function load() {
  status = await (await ask("/api/status")).json();
  const threshold = status.threshold === null ? "no threshold" : `threshold ${number(status.threshold)}`;
  byId("status").textContent = `${count(status.identities, "identity", "identities")}, ${threshold}`;
  byId("tab-duplicates").hidden = !status.duplicates;
}

byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token-text").value.trim());
  byId("token").hidden = true;
  attempt(load);
});

if (location.hash.startsWith("#token=")) { // the part of an address that is not sent to the service
  sessionStorage.setItem("token", decodeURIComponent(location.hash.slice("#token=".length)));
  history.replaceState(null, "", location.pathname);
}

attempt(load);
