// What comes from outside gets into the document as text alone.
"use strict";
(() => {
  const EVERY = 1000; // milliseconds from an answer to the next question
  const PATIENCE = 10000; // milliseconds for an answer
  const RECENT = 600; // seconds for which an error of what is well again is in sight, and not only in the title
  const KEPT = 60; // answers that the small pictures reach back to
  const WIDE = 120, HIGH = 24;

  const COLUMNS = [
    { key: "endpoint", heading: "endpoint", value: (node) => node.endpoint },
    { key: "state", heading: "state", value: (node) => node.state },
    { key: "eligible", heading: "eligible", value: (node) => (node.eligible ? "yes" : "no") },
    { key: "why", heading: "why", value: (node) => node.why },
    { key: "weight", heading: "weight", value: (node) => node.weight, show: few },
    { key: "in_flight", heading: "in flight", value: (node) => node.in_flight, show: count },
    { key: "rate", heading: "per s", value: (node) => node.rate, show: few },
    { key: "p50", heading: "p50 ms", value: (node) => node.p50, show: milliseconds },
    { key: "p99", heading: "p99 ms", value: (node) => node.p99, show: milliseconds },
    { key: "latency", heading: "last minute" },
    { key: "attempts", heading: "attempts", value: (node) => node.attempts, show: count },
    { key: "failures", heading: "failures", value: (node) => node.failures, show: count },
  ];

  // Made once: a number's own toLocaleString makes one for every number.
  const [whole, tenths] = [0, 1].map((digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits }));

  function few(number) {
    return (number < 10 ? tenths : whole).format(number);
  }

  function count(number) {
    return whole.format(number);
  }

  function milliseconds(seconds) {
    return seconds === null ? "–" : few(seconds * 1000);
  }

  function length(seconds) {
    if (seconds === null) return "no answer yet";
    if (seconds < 10) return `${few(seconds)} s`;
    if (seconds < 120) return `${seconds.toFixed(0)} s`;
    return seconds < 7200 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(0)} h`;
  }

  function share(part) {
    return `${count(100 * part)} %`;
  }

  function plural(number, word) {
    return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
  }

  function element(name, text, of) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (of) of.append(made);
    return made;
  }

  function shape(name, kind, of) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    if (kind) made.setAttribute("class", kind);
    if (of) of.append(made);
    return made;
  }

  function say(where, text) {
    if (where.textContent !== text) where.textContent = text;
  }

  const view = { find: "", only: false, sort: "", down: false };

  // Pictures are drawn of the rows that are in sight, or a thousand of them would keep a core busy.
  const rows = new WeakMap();
  const watcher = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
      const row = rows.get(target);
      row.isInSight = isIntersecting;
      row.draw();
    }
  });

  // One row. What has not changed is not touched, or a thousand of them would flicker.
  class Row {
    constructor() {
      this.line = element("tr");
      this.shown = {};
      this.cells = {};
      this.past = [];
      for (const { key, show } of COLUMNS) {
        const cell = element("td", undefined, this.line);
        cell.dataset.column = key;
        if (show) cell.className = "number";
        this.cells[key] = cell;
      }
      this.cells.state = element("span", undefined, this.cells.state);
      this.reason = this.cells.why;
      this.where = element("small");
      this.detail = element("small");
      for (const [key, more] of [["endpoint", this.where], ["why", this.detail]]) {
        const cell = this.cells[key];
        this.cells[key] = element("span", undefined, cell);
        cell.append(more);
      }
      this.picture = shape("svg", "", this.cells.latency);
      this.picture.setAttribute("viewBox", `0 0 ${WIDE} ${HIGH}`);
      this.picture.setAttribute("aria-hidden", "true");
      this.p50 = shape("path", "p50", this.picture);
      this.p99 = shape("path", "p99", this.picture);
      this.slowestOfAll = 0;
      this.isInSight = false;
      rows.set(this.line, this);
      watcher.observe(this.line);
    }

    remove() {
      watcher.unobserve(this.line);
      this.line.remove();
    }

    take(node) {
      this.node = node;
      this.past.push({ p50: node.p50 ?? 0, p99: node.p99 ?? 0 });
      if (this.past.length > KEPT) this.past.shift();
    }

    get slowest() {
      return this.past.reduce((most, each) => Math.max(most, each.p99), 0);
    }

    get isWanted() {
      return !(view.only && this.node.eligible) && this.node.endpoint.includes(view.find);
    }

    show(slowestOfAll) {
      this.slowestOfAll = slowestOfAll; // one scale for all rows of a table, so that they can be compared
      this.line.hidden = !this.isWanted;
      if (this.line.hidden) return;
      for (const { key, value, show } of COLUMNS) {
        if (!value) continue;
        const text = show ? show(value(this.node)) : String(value(this.node));
        if (this.shown[key] !== text) {
          this.shown[key] = text;
          this.cells[key].textContent = text;
          if (key === "state") this.cells.state.className = `state ${text}`;
          if (key === "eligible") this.line.classList.toggle("out", !this.node.eligible);
        }
      }
      this.explain();
      this.draw();
    }

    explain() {
      const { zone, priority, check, eligible, last_error, last_error_age } = this.node;
      const error = last_error && `last error ${length(last_error_age)} ago: ${last_error}`;
      const isRecent = !eligible || last_error_age < RECENT;
      const joined = (...words) => words.filter(Boolean).join("; ");
      say(this.where, joined(zone && `zone ${zone}`, priority && `priority ${priority}`));
      say(this.detail, joined(isRecent && error, check.startsWith("failed") && `check ${check}`));
      const all = joined(error, check && `check ${check}`);
      if (this.reason.title !== all) this.reason.title = all;
    }

    draw() {
      if (!this.isInSight) return;
      const top = this.slowestOfAll || 1;
      const at = (each, index, kind) =>
        `${(WIDE - (this.past.length - 1 - index) * (WIDE / (KEPT - 1))).toFixed(1)} ${(HIGH - 1 - (each[kind] / top) * (HIGH - 2)).toFixed(1)}`;
      const path = (kind) => this.past.map((each, index) => at(each, index, kind)).join("L");
      const began = (WIDE - (this.past.length - 1) * (WIDE / (KEPT - 1))).toFixed(1);
      this.p99.setAttribute("d", this.slowest ? `M${path("p99")}` : "");
      this.p50.setAttribute("d", this.slowest ? `M${began} ${HIGH}L${path("p50")}L${WIDE} ${HIGH}Z` : "");
    }
  }

  class Service {
    constructor(name) {
      this.card = document.getElementById("service").content.firstElementChild.cloneNode(true);
      this.rows = new Map();
      this.facts = {};
      this.find("h2").textContent = name;
      this.heads = COLUMNS.map((column) => this.head(column));
    }

    find(selector) {
      return this.card.querySelector(selector);
    }

    head({ key, heading, value, show }) {
      const head = element("th", value ? undefined : heading, this.find("thead tr"));
      head.scope = "col";
      head.dataset.column = key;
      if (show) head.className = "number";
      if (value) {
        const button = element("button", heading, head);
        button.type = "button";
        button.addEventListener("click", () => sortBy(key));
      }
      return head;
    }

    fact(name, text) {
      if (!this.facts[name]) {
        const pair = element("div", undefined, this.find(".facts"));
        element("dt", name, pair);
        this.facts[name] = element("dd", undefined, pair);
      }
      say(this.facts[name], text);
    }

    take(service) {
      this.service = service;
      const before = this.rows;
      this.rows = new Map();
      for (const node of service.nodes) {
        const row = before.get(node.endpoint) ?? new Row();
        before.delete(node.endpoint);
        row.take(node);
        this.rows.set(node.endpoint, row);
      }
      for (const gone of before.values()) gone.remove();
    }

    show() {
      const { nodes, warnings, panic, source, age, in_flight, budget_tokens, budget_capacity } = this.service;
      const { balancer, limit, panics, throttle_share } = this.service;
      const eligible = nodes.filter((node) => node.eligible).length;
      this.find(".panic").hidden = !panic;
      say(this.find(".share"), `${count(eligible)} of ${plural(nodes.length, "endpoint")} eligible`);
      this.fact("from", source || "–");
      this.fact("confirmed", age === null ? length(age) : `${length(age)} ago`);
      this.fact("attempts per s", few(nodes.reduce((sum, node) => sum + node.rate, 0)));
      this.fact("in flight", limit === null ? count(in_flight) : `${count(in_flight)} of ${count(limit)}`);
      this.fact("retry budget", `${count(Math.floor(budget_tokens))} of ${plural(budget_capacity, "token")}`);
      this.fact("balancer", balancer);
      if (throttle_share || this.facts["refused here"]) this.fact("refused here", share(throttle_share));
      if (panics) this.fact("panics", count(panics));
      this.warn(warnings);
      const rows = sorted([...this.rows.values()]);
      const slowest = rows.reduce((most, row) => Math.max(most, row.slowest), 0);
      for (const row of rows) row.show(slowest);
      this.arrange(rows.map((row) => row.line));
      const isBare = rows.every((row) => row.line.hidden);
      this.find(".scroll").hidden = isBare;
      this.find(".nothing").hidden = !isBare;
      say(this.find(".nothing"), nodes.length ? "no endpoint like that" : "no endpoints");
      for (const [index, head] of this.heads.entries()) {
        const isIt = COLUMNS[index].key === view.sort;
        head.setAttribute("aria-sort", isIt ? (view.down ? "descending" : "ascending") : "none");
      }
    }

    warn(warnings) {
      const list = this.find(".warnings");
      if (this.told !== warnings.join("\n")) {
        this.told = warnings.join("\n");
        list.replaceChildren(...warnings.map((warning) => element("li", warning)));
        list.hidden = !warnings.length;
      }
    }

    arrange(lines) {
      const body = this.find("tbody");
      if (lines.some((line, index) => body.children[index] !== line)) body.append(...lines);
    }
  }

  const collator = new Intl.Collator("en", { numeric: true });

  function sorted(rows) {
    const column = COLUMNS.find(({ key }) => key === view.sort);
    if (!column) return rows;
    const sign = view.down ? -1 : 1;
    return rows.sort((one, other) => {
      const [a, b] = [column.value(one.node), column.value(other.node)];
      return sign * (column.show ? (a ?? -1) - (b ?? -1) : collator.compare(a, b));
    });
  }

  // Numbers from the top, words from the start, then the other way, then as it was.
  function sortBy(key) {
    const fromTop = Boolean(COLUMNS.find((column) => column.key === key).show);
    if (view.sort !== key) Object.assign(view, { sort: key, down: fromTop });
    else if (view.down === fromTop) view.down = !fromTop;
    else view.sort = "";
    show();
  }

  const services = new Map();
  let answeredAt = null;

  function take(told) {
    const main = document.getElementById("services");
    for (const [name, service] of services) {
      if (!(name in told.services)) {
        service.card.remove();
        services.delete(name);
      }
    }
    for (const [name, service] of Object.entries(told.services)) {
      if (!services.has(name)) {
        services.set(name, new Service(name));
        main.append(services.get(name).card);
      }
      services.get(name).take(service);
    }
  }

  function show() {
    for (const service of services.values()) service.show();
    const nodes = [...services.values()].flatMap(({ service }) => service.nodes);
    const out = nodes.filter((node) => !node.eligible).length;
    say(
      document.getElementById("summary"),
      `${plural(services.size, "service")}, ${plural(nodes.length, "endpoint")}, ${out ? count(out) : "none"} not eligible`,
    );
    document.title = out ? `mesh: ${count(out)} not eligible` : "mesh";
  }

  function state(kind, text) {
    const live = document.getElementById("live");
    live.className = kind;
    document.body.classList.toggle("stale", kind === "stale");
    say(live, text);
  }

  function address() {
    const url = new URL(location.href);
    url.pathname = `${url.pathname.replace(/\/+$/, "")}/snapshot.json`;
    url.username = url.password = url.search = url.hash = "";
    return url;
  }

  async function ask() {
    const answer = await fetch(address(), { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) }).catch(() => {
      throw new Error("the server does not answer");
    });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const told = await answer.json().catch(() => ({}));
    if (!told.services) throw new Error("something else answers here");
    return told;
  }

  let timer = null;
  let isAsking = false;

  async function look() {
    clearTimeout(timer);
    if (isAsking || document.hidden) return;
    isAsking = true;
    try {
      take(await ask());
      answeredAt = new Date();
      show();
      state("fresh", `live, ${answeredAt.toLocaleTimeString("en-GB")}`);
    } catch (error) {
      const since = answeredAt ? `stale since ${answeredAt.toLocaleTimeString("en-GB")}: ` : "";
      state("stale", `${since}${error.message}`);
    } finally {
      isAsking = false;
      timer = setTimeout(look, EVERY);
    }
  }

  document.getElementById("find").addEventListener("input", (event) => {
    view.find = event.target.value.trim();
    show();
  });
  document.getElementById("only").addEventListener("change", (event) => {
    view.only = event.target.checked;
    show();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) state("", "paused");
    else look();
  });
  look();
})();
