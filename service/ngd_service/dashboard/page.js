// What a page does by itself: it tells how fresh it is, shows times as its reader's clock has them, and takes keys.
window.page = {
  heard: null,  // when the service last brought the page up to date, by this browser's clock
  state: 'loading',  // what the service said then: live, stale or final
  why: '',
  told(state, why = '') {
    Object.assign(page, {state, why});
    if (state !== 'stale') page.heard = Date.now();
    page.mark();
  },
  ago(ms) {
    const s = Math.max(0, Math.round(ms / 1000));
    for (const [size, unit] of [[86400, 'd'], [3600, 'h'], [60, 'min']]) if (s >= size) return Math.floor(s / size) + ' ' + unit;
    return s + ' s';
  },
  mark() {
    const mark = document.querySelector('.fresh');
    if (!mark) return;
    const silent = page.heard === null ? 0 : Date.now() - page.heard;
    const isLost = document.getElementById('popup')?.ariaHidden === 'false' || (window.socket && !window.socket.connected);
    const state = page.state === 'final' ? 'final' : isLost && window.did_handshake ? 'lost'
      : page.state === 'loading' ? 'loading' : page.state === 'stale' || silent > 5000 ? 'stale' : 'live';
    const [icon, word, title] = {
      loading: ['hourglass_empty', 'Loading', 'The page is being filled'],
      live: ['sync', 'Live', 'Brought up to date once a second'],
      stale: ['history', 'Stale', page.why || 'The service has not brought the page up to date'],
      lost: ['cloud_off', 'Not connected', 'The service is out of reach; the page goes on by itself once it is back'],
      final: ['task_alt', 'Final', page.why || 'Nothing here will change'],
    }[state];
    const age = state === 'stale' || state === 'lost' ? (page.heard === null ? '' : 'since ' + page.ago(silent)) : '';
    mark.className = 'fresh ' + state;
    mark.title = title;
    const texts = {'.fresh-icon': icon, '.fresh-word': word, '.fresh-age': age};
    for (const [part, text] of Object.entries(texts)) {
      const e = mark.querySelector(part);
      if (e.textContent !== text) e.textContent = text;
    }
  },
  rows: () => [...document.querySelectorAll('[data-row]')].filter(e => e.offsetParent),
  move(by) {
    const rows = page.rows(), at = rows.indexOf(document.activeElement);
    rows[Math.min(Math.max(at + by, 0), rows.length - 1)]?.focus();
  },
  help() {
    const sheet = document.getElementById('keys'), seen = [...document.querySelectorAll('[data-key]')];
    const keys = seen.filter(e => e.offsetParent).map(e => [e.dataset.key, e.ariaLabel || e.title || e.innerText]);
    if (page.rows().length) keys.push(['j, k', 'Next and previous job'], ['x', 'Mark the job for comparing'], ['Enter', 'Open the job']);
    keys.push(['g j', 'All jobs'], ['?', 'This sheet'], ['Esc', 'Close it']);
    sheet.querySelector('dl').replaceChildren(...keys.flatMap(([key, text]) => [['dt', key], ['dd', text]]).map(([tag, text]) =>
      Object.assign(document.createElement(tag), {textContent: text})));
    sheet.showModal();
  },
  key(event) {
    const before = page.before;
    page.before = event.key;
    // A closed dialog keeps the focus until the browser next paints: only an open one takes keys for itself.
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.('input, textarea, select, [role=combobox], dialog[open]')) return;
    const target = [...document.querySelectorAll('[data-key]')].find(e => e.dataset.key === event.key && e.offsetParent);
    if (event.key === '?') page.help();
    else if (before === 'g' && event.key === 'j') location.href = '/';
    else if (event.key === 'j' || event.key === 'k') page.move(event.key === 'j' ? 1 : -1);
    else if (event.key === 'x') document.activeElement.closest('tr, .job-card')?.querySelector('[role=checkbox]')?.click();
    else if (target) target.tagName === 'INPUT' ? target.focus() : target.click();
    else return;
    event.preventDefault();
  },
};
// A moment on the reader's own clock, with date and zone; with `ago` its age, and the moment in its title.
customElements.define('reader-time', class extends HTMLElement {
  static observedAttributes = ['datetime'];
  attributeChangedCallback() { this.show(); }
  show() {
    const moment = new Date(this.getAttribute('datetime'));
    if (isNaN(moment)) return;
    const full = moment.toLocaleString(undefined, {dateStyle: 'medium', timeStyle: 'long'});
    this.title = full;
    this.textContent = this.hasAttribute('ago') ? page.ago(Date.now() - moment) + ' ago' : full;
  }
});
setInterval(() => { page.mark(); document.querySelectorAll('reader-time[ago]').forEach(e => e.show()); }, 1000);
document.addEventListener('keydown', page.key);
