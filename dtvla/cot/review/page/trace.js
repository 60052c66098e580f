// Draws an episode's actions: where the hand is told to move, when the gripper is told to close, which frames have thoughts.

const WIDTH = 1000, MIDDLE = 54, REACH = 42, TICKS = 9;  // of the drawing's own 1000 x 100
const MOVES = ["forward", "left", "up"];

function shape(svg, kind, name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  element.setAttribute("class", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  svg.append(element);
}

// facts: of the episode; labelled: [{frame, state}] of it; here: the frame that is looked at.
export function drawTrace(svg, facts, labelled, here) {
  svg.replaceChildren();
  const x = frame => (frame + 0.5) * WIDTH / facts.length;
  for (let start = 0, stop; start < facts.length; start = stop) {
    for (stop = start; stop < facts.length && facts.closing[stop] === facts.closing[start];) stop++;
    if (!facts.closing[start]) continue;
    const step = WIDTH / facts.length;
    shape(svg, "rect", "closing", { x: start * step, y: 0, width: (stop - start) * step, height: 100 });
  }
  shape(svg, "line", "zero", { x1: 0, x2: WIDTH, y1: MIDDLE, y2: MIDDLE });
  const most = Math.max(1e-6, ...facts.moves.flat().map(Math.abs));
  MOVES.forEach((name, axis) => {
    const points = facts.moves.map((move, frame) => `${x(frame)},${MIDDLE - REACH * move[axis] / most}`);
    shape(svg, "polyline", name, { points: points.join(" ") });
  });
  for (const { frame, state } of labelled) {
    shape(svg, "line", `tick ${state}`, { x1: x(frame), x2: x(frame), y1: 0, y2: TICKS });
  }
  shape(svg, "line", "here", { x1: x(here), x2: x(here), y1: 0, y2: 100 });
}

// The frame at a click on the drawing.
export function frameAt(svg, facts, event) {
  const box = svg.getBoundingClientRect();
  return (event.clientX - box.left) / box.width * facts.length - 0.5;
}
