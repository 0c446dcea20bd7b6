"use strict";
(async () => {
  const readout = document.getElementById("readout");
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  if (typeof DecompressionStream === "undefined") return; // the readout says so already
  const [t1, packed] = await Promise.all([unpack(data.t1), unpack(data.labels)]);
  const labels = data.wide ? new Int16Array(packed.buffer) : packed;
  const size = data.shape, stride = [1, size[0], size[0] * size[1]];
  // Across and up of each plane: sagittal y z, coronal x z, axial x y.
  const across = [1, 0, 0], up = [2, 2, 1], ends = [["P", "A"], ["L", "R"], ["L", "R"]];
  const rgb = data.colors.map((c) => c ? [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)) : [0, 0, 0]);
  const views = [...document.querySelectorAll("canvas[data-axis]")];
  const opacity = document.getElementById("opacity"), edges = document.getElementById("edges");
  const at = size.map((n) => n >> 1);
  const SCALE = 3;

  function layer(width, height) {
    const canvas = document.createElement("canvas");
    canvas.width = width; canvas.height = height;
    return { canvas, context: canvas.getContext("2d"), image: new ImageData(width, height) };
  }
  const layers = views.map((canvas, axis) => {
    const w = size[across[axis]], h = size[up[axis]];
    canvas.width = w * SCALE; canvas.height = h * SCALE;
    return [layer(w, h), layer(w, h)];
  });

  function draw(axis) {
    const a = across[axis], u = up[axis], w = size[a], h = size[u], [scan, over] = layers[axis];
    const base = at[axis] * stride[axis], alpha = opacity.value * 2.55, thin = edges.checked;
    for (let row = 0, p = 0; row < h; row++) {
      let i = base + (h - 1 - row) * stride[u];
      for (let x = 0; x < w; x++, p += 4, i += stride[a]) {
        const grey = t1[i], k = labels[i], s = scan.image.data, o = over.image.data;
        s[p] = s[p + 1] = s[p + 2] = grey; s[p + 3] = 255;
        const edge = k && (!x || x === w - 1 || !row || row === h - 1 || labels[i - stride[a]] !== k
          || labels[i + stride[a]] !== k || labels[i - stride[u]] !== k || labels[i + stride[u]] !== k);
        [o[p], o[p + 1], o[p + 2]] = rgb[k];
        o[p + 3] = k && (!thin || edge) ? alpha : 0;
      }
    }
    const canvas = views[axis], c = canvas.getContext("2d");
    for (const { canvas: source, context, image } of [scan, over]) {
      context.putImageData(image, 0, 0);
      c.imageSmoothingEnabled = source === scan.canvas;
      c.drawImage(source, 0, 0, canvas.width, canvas.height);
    }
    c.strokeStyle = "#ffffffaa"; c.lineWidth = 1;
    const x = Math.floor((at[a] + .5) * SCALE) + .5, y = Math.floor((h - .5 - at[u]) * SCALE) + .5, gap = 8;
    c.beginPath();
    for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, canvas.width, y], [x, 0, x, y - gap],
      [x, y + gap, x, canvas.height]]) { c.moveTo(x0, y0); c.lineTo(x1, y1); }
    c.stroke();
    c.fillStyle = "#ced4da"; c.font = "16px system-ui, sans-serif"; c.textBaseline = "top";
    c.fillText(ends[axis][0], 4, 4);
    c.fillText(ends[axis][1], canvas.width - 18, 4);
  }

  function show() {
    for (let axis = 0; axis < 3; axis++) draw(axis);
    const i = at[0] + at[1] * stride[1] + at[2] * stride[2], k = labels[i];
    const mm = [0, 1, 2].map((r) => Math.round(data.affine[r].reduce((sum, m, c) => sum + m * (c < 3 ? at[c] : 1), 0)));
    const name = document.createElement("b");
    name.textContent = k ? data.names[k] : "no structure";
    readout.replaceChildren(name, `${k ? ` (${data.codes[k]})` : ""} at x ${mm[0]}, y ${mm[1]}, z ${mm[2]} mm`);
    if (k) {
      const swatch = document.createElement("span");
      swatch.className = "swatch"; swatch.style.background = data.colors[k];
      readout.prepend(swatch);
    }
  }
  const move = (axis, to) => { at[axis] = Math.max(0, Math.min(size[axis] - 1, Math.round(to))); };

  views.forEach((canvas, axis) => {
    const a = across[axis], u = up[axis];
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      // The image keeps its shape inside the box.
      const k = Math.min(box.width / size[a], box.height / size[u]);
      const left = box.left + (box.width - k * size[a]) / 2, top = box.top + (box.height - k * size[u]) / 2;
      move(a, (event.clientX - left) / k - .5);
      move(u, size[u] - .5 - (event.clientY - top) / k);
      show();
    };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); point(event); });
    canvas.addEventListener("pointermove", (event) => { if (event.buttons) point(event); });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault(); move(axis, at[axis] + Math.sign(event.deltaY)); show();
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [a, -1], ArrowRight: [a, 1], ArrowUp: [u, 1], ArrowDown: [u, -1],
        PageUp: [axis, 1], PageDown: [axis, -1] }[event.key];
      if (step) { event.preventDefault(); move(step[0], at[step[0]] + step[1]); show(); }
    });
  });
  opacity.addEventListener("input", show);
  edges.addEventListener("change", show);
  document.querySelectorAll("button[data-code]").forEach((button) => button.addEventListener("click", () => {
    const centre = data.centres[data.codes.indexOf(Number(button.dataset.code))];
    if (!centre) return;
    centre.forEach((to, axis) => move(axis, to));
    show();
    document.getElementById("viewer").scrollIntoView({ behavior: "smooth" });
  }));
  show();
  document.documentElement.dataset.ready = "yes";
})();
