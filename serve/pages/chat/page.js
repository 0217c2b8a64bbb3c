// What only the browser can do: keep the key in this tab, save a file, highlight the behaviour's markers.
(() => {
  const KEY = "bruno-ray-key";
  const CHOICES = ["left", "right", "system", "temperature", "top_p", "max_tokens", "seed"];

  // The page is reached under whatever path and host the viewer's proxy or tunnel gives it, which the server need
  // not know: everything is asked for where the page itself came from.
  if (window.gradio_config) window.gradio_config.root = location.origin + location.pathname.replace(/\/+$/, "");

  const key = (typed) => {
    const value = typed || sessionStorage.getItem(KEY) || "";
    openStudies(value);
    return value;
  };

  const keepKey = (value) => {
    if (value !== sessionStorage.getItem(KEY)) openStudies(value);
    sessionStorage.setItem(KEY, value || "");
    return [];
  };

  // The study pages are plain links, which carry no Authorization header: they take a cookie in exchange for the key.
  const openStudies = (value) => {
    if (value) fetch("../study/login", { method: "POST", headers: { Authorization: `Bearer ${value}` } });
  };

  const choices = (...values) => Object.fromEntries(CHOICES.map((name, i) => [name, values[i]]));

  const exportConversations = (left, right, system, temperature, top_p, max_tokens, seed) => {
    const content = {
      format: 1,
      exported: new Date().toISOString(),
      system,
      sampling: { temperature, top_p, max_tokens, seed },
      conversations: { left, right },
    };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
    link.download = `bruno-ray-${content.exported.slice(0, 19).replace(/:/g, "-")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    return [];
  };

  // ---- markers: marker and text are compared as bruno_ray.scoring.markers.normalise leaves them
  let markers = [];
  const plain = (character) =>
    /[a-z0-9]/.test(character) ? character
      : /[\u2018\u2019\u201a\u201b\u02bc\u00b4`]/.test(character) ? "'"
      : /[\u201c\u201d\u201e\u201f\u00ab\u00bb]/.test(character) ? '"'
      : character === "*" ? ""
      : /\s/.test(character) ? " "
      : character.toLowerCase();

  const normalise = (text) => [...text].map(plain).join("").replace(/ +/g, " ").trim();
  const BREAKS = new Set(["BR", "P", "LI", "UL", "OL", "PRE", "TR", "TD", "BLOCKQUOTE", "H1", "H2", "H3", "H4"]);

  // Ranges of every marker in the text under `element`, over the borders of its text nodes.
  const rangesIn = (element) => {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
    let text = "";
    const places = [];
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (node.nodeType === Node.ELEMENT_NODE) {
        if (BREAKS.has(node.tagName) && text && !text.endsWith(" ")) {
          text += " ";
          places.push(places[places.length - 1]);
        }
        continue;
      }
      [...node.data].reduce((offset, character) => {
        for (const one of plain(character)) {
          if (one === " " && text.endsWith(" ")) continue;
          text += one;
          places.push([node, offset, offset + character.length]);
        }
        return offset + character.length;
      }, 0);
    }
    const ranges = [];
    for (const marker of markers) {
      for (let at = text.indexOf(marker); at >= 0; at = text.indexOf(marker, at + marker.length)) {
        const range = new Range();
        range.setStart(places[at][0], places[at][1]);
        range.setEnd(places[at + marker.length - 1][0], places[at + marker.length - 1][2]);
        ranges.push(range);
      }
    }
    return ranges;
  };

  const highlight = () => {
    if (!window.Highlight || !markers.length) return;
    const answers = [...document.querySelectorAll(".answers .bot .prose, .answers .bot .md")];
    CSS.highlights.set("behaviour-marker", new Highlight(...answers.flatMap(rangesIn)));
  };

  // Every answer is read anew, so not for every piece that comes.
  let pending = false;
  const redraw = () => {
    if (pending) return;
    pending = true;
    setTimeout(() => { pending = false; highlight(); }, 300);
  };

  const mark = (wanted) => {
    markers = [...new Set((wanted || []).map(normalise).filter(Boolean))];
    for (const chat of document.querySelectorAll(".answers")) {
      if (chat.dataset.watched) continue;
      chat.dataset.watched = "yes";
      new MutationObserver(redraw).observe(chat, { childList: true, characterData: true, subtree: true });
    }
    redraw();
    return [];
  };

  window.bruno = { key, keepKey, choices, exportConversations, mark, normalise };
})();
