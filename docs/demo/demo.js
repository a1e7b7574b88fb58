// Classifies pictures with ONNX Runtime. networks.json, from benchmarks/build_demo.py, names all that is fetched.
const MAX_PIXELS = 50e6, MAX_BYTES = 64 * 2 ** 20, LARGE_SIDE = 1024; // as in data.py and mobilenets_zoo_cli.py
const RUNS = 10, WARM_UP_MS = 500; // a browser runs code slowly until it has compiled it well
const files = new Map(), received = new Map(), runtimes = new Map(), sessions = new Map(), measured = new Map();
let catalogue, pixels, asked = 0, turn = 0, queue = Promise.resolve(); // asked: of pictures; turn: of answers

const $ = (id) => document.getElementById(id);
const millions = (count) => (count / 1e6).toFixed(1);
const title = ({ name, precision }) => `${name} ${precision}`;
const threads = () => (window.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1);

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const complain = ({ message }) => Object.assign($("error"), { textContent: message, hidden: false });
const fail = (error) => { complain(error); $("progress").hidden = true; $("status").textContent = ""; };

// Shows an image file, or what a promise gives; the one that was asked for last, whichever comes last.
function openFile(file, name, note = "") {
  const mine = ++asked;
  Promise.resolve(file).then((blob) => decode(blob, name)).then((bitmap) => {
    if (mine === asked) showImage(bitmap, bitmap.width, bitmap.height, name, note);
    bitmap.close();
  }).catch((error) => mine === asked && complain(error));
}

async function decode(file, name) {
  const refuse = (why) => { throw new Error(`${name} ${why}`); };
  const unreadable = () => refuse("is not an image that this browser reads; choose a PNG or JPEG file.");
  if (file.size > MAX_BYTES) refuse(`has more than ${MAX_BYTES / 2 ** 20} MiB; make the image smaller first.`);
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try { // the size is known before anything is decoded
    await new Promise((onload, onerror) => Object.assign(image, { onload, onerror })).catch(unreadable);
    const { naturalWidth: width, naturalHeight: height } = image;
    if (width * height > MAX_PIXELS)
      refuse(`has ${width} x ${height} pixels; at most ${MAX_PIXELS / 1e6} million are read, make it smaller.`);
    // As Python sees it: turned upright, without the colour profile.
    return await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(unreadable);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

function showImage(source, fullWidth, fullHeight, name, note) {
  const scale = Math.min(1, LARGE_SIDE / Math.max(fullWidth, fullHeight)), size = catalogue.size, photo = $("photo");
  const [width, height] = [fullWidth, fullHeight].map((length) => Math.max(1, Math.round(length * scale)));
  Object.assign(photo, { width, height, ariaLabel: name });
  const context = photo.getContext("2d", { willReadFrequently: true });
  Object.assign(context, { fillStyle: "white", imageSmoothingQuality: "high" }); // white behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  pixels = cropAndShrink(context.getImageData(0, 0, width, height), size);
  context.fillStyle = "rgb(128 128 128 / 70%)"; // over what the crop leaves out
  const side = Math.min(width, height), x = (width - side) / 2, y = (height - side) / 2;
  context.fill(new Path2D(`M0 0H${width}V${height}H0ZM${x} ${y}h${side}v${side}h${-side}Z`), "evenodd");
  const seen = Object.assign($("seen"), { width: size, height: size }), shrunk = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) shrunk.data.set([...pixels.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  seen.getContext("2d").putImageData(shrunk, 0, 0);
  seen.ariaLabel = `${name}, cropped and shrunk to ${size} x ${size} pixels`;
  $("caption").textContent = name + note;
  $("seen-caption").textContent = `What the network sees: ${size} x ${size} pixels`;
  $("result").hidden = false;
  classify();
}

// Bicubic with antialiasing, the short side to `size`, the middle of the long one: timm's transform, as Pillow does it.
function cropAndShrink({ data, width, height }, size) {
  const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);
  const halfToEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));
  const taps = (length) => { // for each of `size` results, the first value that it is made of, and the values' weights
    const shrunk = Math.floor((size * length) / Math.min(width, height)), scale = length / shrunk;
    const stretch = Math.max(scale, 1), first = halfToEven((shrunk - size) / 2);
    return Array.from({ length: size }, (_, i) => {
      const centre = (first + i + 0.5) * scale, low = Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
      const count = Math.min(length, Math.trunc(centre + 2 * stretch + 0.5)) - low;
      const weights = Array.from({ length: count }, (_, j) => cubic(Math.abs(low + j - centre + 0.5) / stretch));
      const sum = weights.reduce((a, b) => a + b);
      return [low, weights.map((weight) => weight / sum)];
    });
  };
  const rows = new Uint8ClampedArray(height * size * 3), result = new Uint8ClampedArray(size * size * 3); // they round
  for (const [x, [low, weights]] of taps(width).entries())
    for (let y = 0; y < height; y++)
      for (let c = 0, from = 4 * (y * width + low); c < 3; c++)
        rows[3 * (y * size + x) + c] = weights.reduce((sum, weight, j) => sum + weight * data[from + 4 * j + c], 0);
  for (const [y, [low, weights]] of taps(height).entries())
    for (let i = 0; i < 3 * size; i++)
      result[3 * size * y + i] = weights.reduce((sum, weight, j) => sum + weight * rows[3 * size * (low + j) + i], 0);
  return new Uint8Array(result.buffer);
}

async function download(file) {
  const count = (chunk) => received.set(file, (received.get(file) ?? 0) + chunk.length);
  const counter = new TransformStream({ transform(chunk, stream) { count(chunk); stream.enqueue(chunk); } });
  try {
    const response = await fetch(file);
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    return new Uint8Array(await new Response(response.body.pipeThrough(counter)).arrayBuffer());
  } catch (error) {
    received.delete(file);
    throw new Error(`The file ${file} can't be fetched: ${error.message}; try again.`);
  }
}

// Remembers what `make` gives, but not that it failed.
function once(map, key, make) {
  if (!map.has(key)) map.set(key, make().catch((error) => { map.delete(key); throw error; }));
  return map.get(key);
}

// Waits for a promise; ends what isn't the answer that was asked for last.
const current = (mine, promise) => Promise.resolve(promise).then((value) => mine === turn ? value : Promise.reject());

async function startRuntime(backend) {
  if (!window.WebAssembly) throw new Error("This browser runs no WebAssembly; allow it or use another browser.");
  const { module, glue, wasm } = catalogue.runtime[backend], get = () => download(wasm.file);
  const refuse = () => { throw new Error(`The file ${module.file} can't be loaded; reload the page.`); };
  const loading = [import(`./${module.file}`).catch(refuse), once(files, wasm.file, get)];
  const [ort, binary] = await Promise.all(loading), wasmPaths = { mjs: new URL(glue.file, import.meta.url).href };
  Object.assign(ort.env.wasm, { wasmBinary: binary.buffer, wasmPaths, numThreads: threads() });
  return ort;
}

// Downloads don't wait for one another; what runs does.
function classify() {
  if (!pixels) return;
  const mine = ++turn, backend = $("backend").value, chosen = [$("network").value, $("other").value].filter(Boolean);
  const networks = [...new Set(chosen)].map((file) => catalogue.networks.find((network) => network.file === file));
  const wanted = [catalogue.runtime[backend].wasm, ...networks], bar = $("progress");
  const left = () => wanted.reduce((sum, { file, bytes }) => sum + bytes - (received.get(file) ?? 0), 0);
  const total = left();
  $("error").hidden = true; $("cards").replaceChildren();
  $("status").textContent = total ? `Fetching ${millions(total)} MB` : "Running";
  Object.assign(bar, { max: total, value: 0, hidden: !total });
  const watch = setInterval(() => { if (mine === turn) bar.value = total - left(); }, 50);
  const loading = [once(runtimes, backend, () => startRuntime(backend))];
  for (const { file } of networks) loading.push(once(files, file, () => download(file)));
  current(mine, Promise.all(loading).finally(() => clearInterval(watch))).then((loaded) => {
    bar.removeAttribute("value"); // nobody knows how long starting takes
    const running = queue.then(() => run(mine, networks, backend, ...loaded));
    queue = running.catch(() => {});
    return running;
  }).catch((error) => mine === turn && fail(error));
}

async function run(mine, networks, backend, ort, ...contents) {
  await current(mine);
  const create = (i) => ort.InferenceSession.create(contents[i], { executionProviders: [backend] });
  const starting = networks.map(({ file }, i) => once(sessions, `${file} ${backend}`, () => create(i)));
  const opened = await current(mine, Promise.all(starting).catch((error) => {
    throw new Error(`The network can't be started: ${error.message.split("\n")[0]}`);
  }));
  $("progress").hidden = true;
  const count = threads(), spoken = [];
  const place = backend === "wasm" ? `CPU, ${count} thread${count > 1 ? "s" : ""}` : "GPU";
  for (const [i, network] of networks.entries()) {
    const { inputNames: [input], outputNames: [output] } = opened[i];
    const feeds = { [input]: new ort.Tensor("uint8", pixels, [1, catalogue.size, catalogue.size, 3]) };
    const probabilities = (await current(mine, opened[i].run(feeds)))[output].data;
    const classes = catalogue.classes.map((name, label) => ({ name, share: probabilities[label] }));
    const best = classes.sort((a, b) => b.share - a.share).slice(0, 5);
    const time = element("p", { className: "time" }, "…");
    $("cards").append(card(network, best, time, place));
    const times = [], key = `${network.file} ${place}`, warm = performance.now() + (measured.has(key) ? 0 : WARM_UP_MS);
    while (times.length < RUNS) {
      await new Promise((resolve) => setTimeout(resolve)); // the page stays awake in between
      const start = performance.now();
      await current(mine, opened[i].run(feeds));
      if (start >= warm) times.push(performance.now() - start);
    }
    times.sort((a, b) => a - b);
    const median = (times[RUNS / 2 - 1] + times[RUNS / 2]) / 2;
    const ms = median.toFixed(2), rate = Math.round(1000 / median);
    time.replaceChildren(`${ms} ms `, element("span", {}, `${rate} images/s`));
    measured.set(key, [title(network), place, millions(network.bytes), millions(network.macs), ms, rate]);
    spoken.push(`${title(network)}: ${best[0].name}, ${(100 * best[0].share).toFixed(0)} %, in ${ms} ms`);
  }
  $("status").textContent = spoken.join("; ");
  const line = (row) => element("tr", {}, ...row.map((cell) => element("td", {}, `${cell}`)));
  $("rows").replaceChildren(...[...measured.values()].map(line));
  $("measured").hidden = false;
}

function card(network, best, time, place) {
  const top1 = `${network.top1.toFixed(2)} %${network.precision === "fp32" ? "" : " (of fp32)"}`;
  const size = `${millions(network.bytes)} MB`, MACs = `${millions(network.macs)} M`;
  const facts = { size, MACs, "top-1": top1, "run on": place };
  const terms = Object.entries(facts).flatMap(([term, fact]) => [element("dt", {}, term), element("dd", {}, fact)]);
  const rows = best.map(({ name, share }) => {
    const bar = element("i", { ariaHidden: "true" }), percent = `${(100 * share).toFixed(1)} %`;
    bar.style.setProperty("--share", percent.replace(" ", ""));
    return element("li", {}, element("span", {}, name.replaceAll("_", " ")), element("span", {}, percent), bar);
  });
  const head = element("h3", {}, title(network));
  return element("article", {}, head, time, element("dl", {}, ...terms), element("ol", {}, ...rows));
}

async function useCamera() {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }).catch(() => {
    throw new Error("The camera can't be used: there is none, or it isn't allowed; choose an image file instead.");
  });
  $("video").srcObject = stream; // asked for twice, there are two of them
  $("viewfinder").addEventListener("close", () => stream.getTracks().forEach((track) => track.stop()), { once: true });
  $("viewfinder").showModal();
}

function shoot() {
  const video = $("video");
  if (!video.videoWidth) return; // it hasn't started
  asked++; // a picture that still loads comes too late
  showImage(video, video.videoWidth, video.videoHeight, "Photograph", "");
  $("viewfinder").close();
}

const openOwn = ([file]) => openFile(file ?? new Blob(), file?.name || "Your picture");

async function copy() {
  const head = [...document.querySelectorAll("thead th")].map((cell) => cell.textContent);
  const table = [head, head.map(() => "---"), ...measured.values()].map((row) => `| ${row.join(" | ")} |`);
  const where = `ONNX Runtime Web ${catalogue.runtime.version}, median of ${RUNS} runs, ${navigator.userAgent}`;
  const text = `${table.join("\n")}\n\n${where}\n`;
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  $("copied").textContent = done ? "Copied" : "The clipboard can't be used here; select the table instead";
}

async function start() {
  catalogue = JSON.parse(new TextDecoder().decode(await download("networks.json")));
  $("home").href = catalogue.home;
  $("version").textContent = catalogue.runtime.version;
  for (const network of catalogue.networks)
    for (const select of ["network", "other"])
      $(select).append(element("option", { value: network.file }, `${title(network)}, ${millions(network.bytes)} MB`));
  for (const { label, files: pair } of catalogue.pairs) {
    const onclick = () => { [$("network").value, $("other").value] = pair; classify(); };
    $("pairs").append(element("button", { type: "button", onclick }, label));
  }
  for (const { file, name, note } of catalogue.samples) {
    const onclick = () => openFile(download(file).then((content) => new Blob([content])), name, note);
    const image = element("img", { src: file, alt: name, width: 72, height: 72 });
    $("samples").append(element("button", { type: "button", title: name, onclick }, image));
  }
  for (const id of ["network", "other", "backend"]) $(id).onchange = classify;
  $("choose").onclick = () => $("file").click();
  $("file").onchange = () => { openOwn([...$("file").files]); $("file").value = ""; };
  $("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  $("camera").onclick = () => useCamera().catch(complain);
  $("shoot").onclick = shoot;
  $("stop").onclick = () => $("viewfinder").close();
  document.ondragover = (event) => event.preventDefault();
  document.ondrop = (event) => { event.preventDefault(); openOwn(event.dataTransfer.files); };
  document.onpaste = (event) => openOwn(event.clipboardData.files);
  $("copy").onclick = copy;
  const size = `${millions(catalogue.runtime.wasm.wasm.bytes)} MB`;
  $("status").textContent = `Pick a picture: the runtime, ${size}, and the network are fetched with the first one.`;
  $("backend-field").hidden = !(await navigator.gpu?.requestAdapter().catch(() => null));
}

start().catch(fail);
