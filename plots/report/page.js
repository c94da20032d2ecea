"use strict";
// The page is complete without this script, which sorts, filters and shows single samples. Text is set only by textContent.
(() => {
  const find = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  // The state is stored behind the # of the address, so that a view can be sent as a link.
  const state = new URLSearchParams(location.hash.startsWith("#?") ? location.hash.slice(2) : "");
  const keep = (name, value) => {
    if (value) state.set(name, value); else state.delete(name);
    const text = state.toString();
    history.replaceState(null, "", text ? "#?" + text : location.pathname + location.search);
  };

  // Sorting: numbers are sorted by data-value, text by its letters; cells without a value stay at the end.
  const sort = (table, column, direction) => {
    const body = table.tBodies[0];
    const numeric = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
    const value = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent;
      return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
    };
    const keyed = [...body.rows].map((row) => [value(row), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    body.append(...keyed.map(([, row]) => row));
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      if (i === column) cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
  };
  for (const table of document.querySelectorAll("[data-sortable]")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = head.classList.contains("number") ? -1 : 1;
      const direction = now === null ? first : now === "ascending" ? -1 : 1;
      sort(table, column, direction);
      if (table.id === "runs") keep("sort", column + (direction > 0 ? " up" : " down"));
    }));
  }

  // Filters: all four filters apply to rows, benchmark and model also to panels.
  const names = ["benchmark", "model", "budget"];
  const filter = () => {
    const wanted = Object.fromEntries(names.map((name) => [name, find("filter-" + name).value]));
    const text = find("filter-text").value.trim().toLowerCase();
    const fits = (element, keys) => keys.every((key) => !wanted[key] || element.dataset[key] === wanted[key]);
    for (const row of document.querySelectorAll("tr[data-row]")) {
      row.hidden = !fits(row, names) || (text !== "" && !row.textContent.toLowerCase().includes(text));
    }
    for (const panel of document.querySelectorAll("[data-panel]")) panel.hidden = !fits(panel, ["benchmark", "model"]);
    const rows = [...document.querySelectorAll("#runs tbody tr")];
    const shown = rows.filter((row) => !row.hidden).length;
    find("filter-count").textContent = shown === rows.length ? rows.length + " rows" : shown + " of " + rows.length + " rows";
    for (const name of names) keep(name, wanted[name]);
    keep("text", text);
  };
  for (const name of [...names, "text"]) {
    const field = find("filter-" + name);
    field.value = state.get(name) || "";
    if (field.value !== (state.get(name) || "")) field.value = "";
    field.addEventListener(name === "text" ? "input" : "change", filter);
  }
  find("filter-clear").addEventListener("click", () => {
    for (const name of [...names, "text"]) find("filter-" + name).value = "";
    filter();
  });
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  const [column, order] = (state.get("sort") || "").split(" ");
  const table = find("runs");
  if (table && order && table.tHead.rows[0].cells[Number(column)]) sort(table, Number(column), order === "up" ? 1 : -1);
  filter();

  // Samples.
  if (!find("samples")) return;
  const data = JSON.parse(find("data").textContent);
  const fill = (select, options, wanted) => {
    select.replaceChildren(...options.map(([value, label]) => {
      const option = make("option", label);
      option.value = value;
      return option;
    }));
    if (options.some(([value]) => String(value) === String(wanted))) select.value = wanted;
  };
  const place = (entry) => JSON.stringify([entry.benchmark, entry.model]);
  const places = [...new Set(data.samples.map(place))];
  const [left, right, task, sample] = ["left", "right", "task", "id"].map((name) => find("sample-" + name));
  const where = find("sample-place");
  const answer = (entry, run) => entry.answers.find((one) => one.run === Number(run));
  const label = (run, runs) => {
    const alike = (keys) => runs.filter((other) => keys.every((key) => other[key] === run[key])).length > 1;
    let text = run.method;
    if (run.budget !== "-" && run.budget !== "all") text += ", " + run.budget;
    if (alike(["method", "budget"])) text += " (" + run.question + (alike(["method", "budget", "question"]) ? " " + run.key.slice(0, 6) : "") + ")";
    return text;
  };
  let entries = [];

  const pickPlace = () => {
    const here = data.runs.map((run, i) => [i, run]).filter(([, run]) => place(run) === where.value);
    const runs = here.map(([, run]) => run);
    const options = here.map(([i, run]) => [i, label(run, runs)]);
    fill(left, options, state.get("left"));
    fill(right, options, state.get("right"));
    if (!state.has("right") && options.length > 1) right.selectedIndex = 1;
    const tasks = [...new Set(data.samples.filter((entry) => place(entry) === where.value).map((entry) => entry.task))];
    fill(task, tasks.map((name) => [name, name]), state.get("task"));
    pickTask();
  };
  const pickTask = () => {
    const score = (entry, run) => (answer(entry, run) || {}).score;
    const differ = find("sample-differ").checked;
    const before = sample.value || state.get("sample");
    entries = data.samples.map((entry, i) => [i, entry]).filter(([, entry]) =>
      place(entry) === where.value && entry.task === task.value &&
      (!differ || score(entry, left.value) !== score(entry, right.value)));
    fill(sample, entries.map(([i, entry]) => [i, entry.id]), before);
    show();
  };
  const card = (element, run, entry) => {
    const found = entry && run !== "" ? answer(entry, run) : undefined;
    const head = make("header");
    const select = element.id === "answer-left" ? left : right;
    head.append(make("b", select.selectedOptions.length ? select.selectedOptions[0].textContent : ""));
    element.replaceChildren(head);
    if (!found) {
      element.append(make("p", entry ? "No record of this sample embedded." : "No sample.", "note"));
      return;
    }
    const counts = [];
    if (found.prompt_tokens !== undefined) counts.push(found.prompt_tokens + " prompt tokens");
    if (found.new_tokens !== undefined) counts.push(found.new_tokens + " generated");
    head.append(make("span", counts.join(", ")));
    head.append(make("strong", found.status !== "ok" ? found.status : found.score === undefined ? "-" : found.score.toFixed(1)));
    element.append(make("pre", found.text));
    if (found.cut) element.append(make("p", "… " + found.cut + " more characters were cut off", "note limit"));
  };
  const show = () => {
    const entry = data.samples[sample.value === "" ? -1 : Number(sample.value)];
    const about = find("sample-about");
    about.replaceChildren();
    const line = (name, text) => about.append(make("dt", name), make("dd", text));
    if (entry) {
      if (entry.prompt) line("prompt ends", "… " + entry.prompt);
      for (const one of entry.references) line("reference", one.text + (one.cut ? " … " + one.cut + " more characters" : ""));
      if (entry.more) line("", entry.more + " more references");
      for (const [name, value] of Object.entries(entry.facts)) line(name, value);
    }
    card(find("answer-left"), left.value, entry);
    card(find("answer-right"), right.value, entry);
    find("sample-count").textContent = entries.length ? sample.selectedIndex + 1 + " of " + entries.length : "none";
  };
  const remember = () => {
    for (const [name, field] of [["place", where], ["task", task], ["sample", sample], ["left", left], ["right", right]]) {
      keep(name, field.value);
    }
  };
  const step = (by) => {
    sample.selectedIndex = Math.min(Math.max(sample.selectedIndex + by, 0), sample.options.length - 1);
    show();
    remember();
  };
  const changed = (field, action) => field.addEventListener("change", () => { action(); remember(); });
  changed(where, () => { for (const name of ["left", "right", "task", "sample"]) state.delete(name); sample.replaceChildren(); pickPlace(); });
  changed(task, pickTask);
  changed(left, pickTask);
  changed(right, pickTask);
  changed(find("sample-differ"), pickTask);
  changed(sample, show);
  find("sample-previous").addEventListener("click", () => step(-1));
  find("sample-next").addEventListener("click", () => step(1));
  fill(where, places.map((text) => [text, JSON.parse(text).join(" on ")]), state.get("place"));
  pickPlace();
})();
