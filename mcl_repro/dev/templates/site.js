// The site works without this; it opens folded code that a link leads to, folds and unfolds all of it, and filters the claims.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;  // a page on disk may not read other pages

function reveal() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target && target.matches(".cell") && target.querySelector("details");
  if (folded && !folded.open) { folded.open = true; target.scrollIntoView({block: "start"}); }
}

function foldAll() {
  const folded = document.querySelectorAll(".cell details"), place = document.querySelector("p.origin");
  if (!folded.length || !place) return;
  const button = place.appendChild(document.createElement("button"));
  const name = () => { button.textContent = [...folded].every(d => d.open) ? "fold all code" : "unfold all code"; };
  button.type = "button"; button.className = "fold-all"; name();
  button.addEventListener("click", () => { const open = ![...folded].every(d => d.open); folded.forEach(d => { d.open = open; }); name(); });
}

function filterClaims() {
  const form = document.querySelector(".claims-filter"), table = document.querySelector("table.claims");
  if (!form || !table) return;
  form.hidden = false;
  const rows = [...table.tBodies[0].rows], [paper, verdict, words] = ["paper", "verdict", "words"].map(n => form.elements[n]);
  const given = new URLSearchParams(location.search);
  for (const field of [paper, verdict, words]) if (given.get(field.name)) field.value = given.get(field.name);
  const apply = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = (paper.value && row.dataset.paper !== paper.value) || (verdict.value && row.dataset.verdict !== verdict.value)
        || !words.value.toLowerCase().split(/\s+/).every(w => row.textContent.toLowerCase().includes(w));
      shown += !row.hidden;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length} claims`;
  };
  form.addEventListener("input", apply); form.addEventListener("submit", e => e.preventDefault()); apply();
}

document.addEventListener("DOMContentLoaded", () => { foldAll(); filterClaims(); reveal(); });
window.addEventListener("hashchange", reveal);
