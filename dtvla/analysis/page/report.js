// Films and thoughts go together: the thought of the moment is marked, and a thought leads to its moment.
"use strict";
const FRAMES_PER_SECOND = {{ frames_per_second }};

for (const film of document.querySelectorAll("video")) {
  // Some phones play no data: addresses, but all play what is in memory.
  const [head, body] = film.src.split(",");
  const bytes = Uint8Array.from(atob(body), (sign) => sign.charCodeAt(0));
  film.src = URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(";")[0] }));

  const thoughts = [...film.parentElement.querySelectorAll(".moments li")];
  const mark = () => {
    const step = Math.floor(film.currentTime * FRAMES_PER_SECOND);
    const now = thoughts.findLast((thought) => Number(thought.dataset.first) <= step);
    for (const thought of thoughts) thought.classList.toggle("now", thought === now);
    if (now && !film.paused) {
      const list = now.parentElement;
      list.scrollTop = now.offsetTop - (list.clientHeight - now.clientHeight) / 2;
    }
  };
  film.addEventListener("timeupdate", mark);
  film.addEventListener("seeked", mark);
  for (const thought of thoughts) {
    thought.classList.add("seekable");
    thought.addEventListener("click", () => {
      film.currentTime = (Number(thought.dataset.first) + 0.5) / FRAMES_PER_SECOND;
    });
  }
}
