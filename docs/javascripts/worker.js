// Pages that are opened from a folder (file://) may start no worker, and the search of the theme is one.
// There, and nowhere else, a worker's script runs in a hidden frame and gets messages as text, by function calls.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.frame = frame;
      this.ready = new Promise((done) => document.addEventListener("DOMContentLoaded", done)).then(
        () => new Promise((done) => {
          window.workerReady = done;
          frame.srcdoc = `<script>
            self.postMessage = (data) => parent.workerSays(JSON.stringify(data));
            self.hear = (text) => dispatchEvent(new MessageEvent("message", { data: JSON.parse(text) }));
            self.importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((done, fail) => {
              const script = document.createElement("script");
              script.src = url; script.onload = done; script.onerror = fail;
              document.head.appendChild(script);
            })));
          <\/script><script src="${url}"><\/script><script>parent.workerReady();<\/script>`;
          document.body.appendChild(frame);
        }),
      );
      window.workerSays = (text) => {
        const event = new MessageEvent("message", { data: JSON.parse(text) });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.hear(JSON.stringify(data)));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
