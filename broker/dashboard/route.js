// Where one is stands behind the # of the address: links, bookmarks and the back button work, and no server is asked.

/** Read an address: `{page, name, params}`. */
export function readRoute(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [page = "", name = ""] = path.split("/").map(decoded);
  return { page: page || "queues", name, params: Object.fromEntries(new URLSearchParams(query)) };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Write an address; what is empty in `params` is left out. */
export function link(page, name = "", params = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const query = new URLSearchParams(given).toString();
  const path = [page === "queues" && !name ? "" : page, name].filter(Boolean).map(encodeURIComponent).join("/");
  return `#/${path}${query ? `?${query}` : ""}`;
}

// Of each page of a list, the address of the page before; where it is not known, that is the first one.
const before = new Map();

/** The addresses of the next and the previous page of a list; null where there is none. */
export function neighbours(page, name, params, next) {
  const here = link(page, name, params);
  const following = next === null || next === undefined ? null : link(page, name, { ...params, after: next });
  // Until its answer is there, a page still has the cursor that leads to itself.
  if (following && following !== here) before.set(following, here);
  const first = link(page, name, { ...params, after: "" });
  return { next: following, previous: params.after ? (before.get(here) ?? first) : null };
}
