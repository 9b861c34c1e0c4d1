"use strict";
// Keys 1 to 6 answer, Enter sends; a click enlarges a picture. Without this script the page is a plain form.

const form = document.querySelector("form[method=post] fieldset")?.form;
const dialog = document.querySelector("dialog");

if (form) {
  const send = form.querySelector(".actions button");
  form.addEventListener("submit", () => setTimeout(() => (send.disabled = true))); // a second click sends nothing
  addEventListener("pageshow", () => (send.disabled = false));
  addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || dialog.open) return;
    const own = event.target.closest("a, button, summary, input:not([type=radio])");
    const radio = /^[1-6]$/.test(event.key) && form.querySelector(`input[data-key="${event.key}"]`);
    if (radio && own?.id !== "link") {
      radio.checked = true;
      radio.focus({ preventScroll: true });
    } else if (event.key === "Enter" && !own) {
      event.preventDefault();
      if (!send.disabled) form.requestSubmit(send);
    }
  });
}

if (dialog) {
  const links = [...document.querySelectorAll("a[data-side]")];
  const show = (link) => {
    dialog.querySelector("img").src = link.href;
    dialog.querySelector(".side").textContent = `${link.dataset.side} picture`;
    dialog.dataset.side = link.dataset.side;
  };
  const other = () => show(links.find((link) => link.dataset.side !== dialog.dataset.side));
  for (const link of links) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      show(link);
      dialog.showModal();
    });
  }
  dialog.querySelector(".other").addEventListener("click", other);
  dialog.querySelector("img").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") other();
  });
}

for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) continue; // browsers offer it only over https or on localhost
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).value);
    button.textContent = "Copied";
  });
}
