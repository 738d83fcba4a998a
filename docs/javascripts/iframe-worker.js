// Pages that are opened as files may not start workers, in which search runs: run these in a hidden frame there. The name
// "iframe-worker" in mkdocs.yml keeps the theme's offline plugin from fetching such a script from the network.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      this.ready = new Promise((resolve) => {
        inside.document.open();
        inside.document.close();
        inside.postMessage = (data) => {
          const message = new MessageEvent("message", { data });
          this.dispatchEvent(message);
          this.onmessage?.(message);
        };
        const load = (source) =>
          new Promise((done) => {
            const script = inside.document.createElement("script");
            script.src = source;
            script.onload = done;
            inside.document.body.append(script);
          });
        inside.importScripts = (...sources) => sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
        load(url).then(resolve);
      });
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready.then(() => inside.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
