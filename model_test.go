package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestModel plays rooms of three processes with a Redis of a few lines, in one goroutine and in no
// time, over what the program itself is made of: reconcile, feed, Log, room.next and the polls of
// stream.run. Connections lag and are cut, EXEC runs and its answer is lost or it runs late,
// processes stand still and die, Redis restarts with its data or, in the other half, comes back
// empty or from a snapshot. Six readers go from process to process; clients send each message until
// it is accepted.
//
// As long as Redis keeps its data each reader must get every message once, in the one order in which
// Redis took them, and no gap but for what left the ring. When Redis forgets, what a reader did not
// get must be followed by a gap, unless only the dead had it. At the end all logs are the list.
//
// CHAT_MODEL sets how many runs, CHAT_SEED repeats one.
func TestModel(t *testing.T) {
	t.Parallel()
	first, runs := rand.Uint64()>>1, 1000
	if os.Getenv("CI") == "true" {
		runs = 5000
	}
	if seed, err := strconv.ParseUint(os.Getenv("CHAT_SEED"), 10, 64); err == nil {
		first, runs = seed, 1
	}
	if n, err := strconv.Atoi(os.Getenv("CHAT_MODEL")); err == nil {
		runs = n
	}
	failed, gaps := 0, 0
	for seed := first; seed < first+uint64(runs) && failed < 5; seed++ {
		m := newModel(seed)
		if what := m.run(); what != "" {
			failed++
			t.Errorf("CHAT_SEED=%d (size %d, %d messages, keeps %v): %s", seed, m.size, m.length, m.keeps, what)
		}
		if !m.keeps {
			gaps += m.gaps
		}
	}
	t.Logf("%d runs, %d gaps told", runs, gaps)
}

// A model is one run.
type model struct {
	*rand.Rand
	size, length int // of the rings, and in messages
	patience     int // of the clients
	rarity       int // of faults
	keeps        bool
	clock        int // steps so far
	wrong        string
	gaps         int

	processes []*modelProcess
	clients   []*modelClient
	readers   []*modelReader

	// Redis: the list, what is on the way to it and from it, and what it could come back with.
	list     []string
	version  int // of the list, for WATCH
	snapshot []string
	saved    int // how many items had been pushed then
	writes   int // of the whole list

	order    []string       // keys as Redis first took them
	place    map[string]int // key → its place there
	pushed   map[string]int // key → how many lines, foreign ones too, had been published before
	listed   map[string]int // key → how many items had been pushed before
	lines    int
	items    int
	at       map[string]int // key → the step at which it was pushed first
	accepted map[string]bool
	dead     map[string]bool // was held by nobody any more
	next     int             // number of the next message
}

func newModel(seed uint64) *model {
	m := &model{Rand: rand.New(rand.NewPCG(seed, 0)), place: map[string]int{}, pushed: map[string]int{}, listed: map[string]int{},
		at: map[string]int{}, accepted: map[string]bool{}, dead: map[string]bool{}}
	m.size = []int{8, 16, 64}[m.IntN(3)]
	m.length = 50 + m.IntN(450)
	if m.IntN(2) == 0 {
		m.length = 50 + m.IntN(50)
	}
	m.keeps = m.IntN(2) == 0
	m.patience, m.rarity = 2+m.IntN(6), 50+m.IntN(300)
	if !m.keeps && m.IntN(4) == 0 { // a young room of the impatient
		m.size, m.length, m.patience, m.rarity = 64, 2+m.IntN(20), 1, 20+m.IntN(40)
	} else if m.IntN(2) == 0 { // the room is full
		for range listSize(m.size) + m.IntN(3) {
			m.push(entry{newID(m.name()), "[12:00:00] old"})
		}
	}
	for range 3 {
		m.processes = append(m.processes, &modelProcess{model: m})
	}
	for range 4 {
		m.clients = append(m.clients, &modelClient{model: m})
	}
	for i := range 6 {
		r := &modelReader{model: m, polls: i%3 == 2, last: -1, lastRaw: -1, seen: map[string]bool{}, begun: -1, fresh: i%2 == 0}
		if !r.fresh {
			r.after = "0"
		}
		m.readers = append(m.readers, r)
	}
	return m
}

func (m *model) name() string { m.next++; return fmt.Sprintf("message-%08d", m.next) }

func (m *model) trace(format string, args ...any) {
	if os.Getenv("CHAT_TRACE") != "" {
		fmt.Printf("%6d "+format+"\n", append([]any{m.clock}, args...)...)
	}
}

func (m *model) pn(p *modelProcess) int { return slices.Index(m.processes, p) }

func brief(l []entry) (out []string) {
	for _, e := range l {
		x := keyOf(e.id)
		x = strings.TrimPrefix(x, "message-00000")
		if e.gap() {
			x = "G" + x[:3]
		}
		out = append(out, x)
	}
	return
}

func (m *model) fail(format string, args ...any) {
	if m.wrong == "" {
		m.wrong = fmt.Sprintf("at step %d: ", m.clock) + fmt.Sprintf(format, args...)
	}
}

// run returns what was wrong, "" if nothing.
func (m *model) run() string {
	defer func() {
		for _, p := range m.processes {
			p.die()
		}
	}()
	end := m.next + m.length
	for m.next < end && m.wrong == "" {
		m.step(true, end)
	}
	writes := m.writes
	for quiet := 0; m.wrong == ""; quiet++ {
		m.step(false, end)
		if quiet%50 == 0 && m.over() {
			break
		}
		if quiet > 20000 {
			m.fail("it does not come to rest: %s", m.unrest())
		}
	}
	if m.writes > writes+12 {
		m.fail("the list was written %d times after the last fault", m.writes-writes)
	}
	for i, r := range m.readers {
		r.judge(i)
	}
	m.compare()
	return m.wrong
}

// step lets somebody do something.
func (m *model) step(faults bool, end int) {
	m.clock++
	p := m.processes[m.IntN(len(m.processes))]
	if faults && m.IntN(m.rarity) == 0 {
		m.disturb(p)
		return
	}
	switch n := m.IntN(100); {
	case n < 50:
		p.step(faults)
	case n < 60:
		p.execute(faults)
	case n < 75:
		m.clients[m.IntN(len(m.clients))].step(end)
	case n == 75 && m.IntN(4) == 0 && faults:
		m.lines++
		m.publish("chat", fmt.Sprint("foreign ", m.IntN(3)))
	default:
		m.readers[m.IntN(len(m.readers))].step(faults)
	}
}

// disturb breaks something.
func (m *model) disturb(p *modelProcess) {
	before := m.held()
	was := ""
	defer func() { m.trace("FAULT %s on %d list %v", was, m.pn(p), brief(m.parsed())) }()
	switch n := m.IntN(12); {
	case n < 3:
		p.cut()
		was = "cut"
	case n < 5:
		p.die()
		was = "die"
	case n < 7:
		was = "freeze"
		p.frozen = m.clock + m.IntN(600)
	case n == 7: // a restart
		m.cutAll()
		was = "restart"
	case m.keeps:
	case n == 8:
		was = "snapshot"
		m.snapshot, m.saved = slices.Clone(m.list), m.items
	case n == 9: // FLUSHALL
		was = "flush"
		m.list = nil
		m.version++
	case n == 10: // a restart with nothing
		was = "empty"
		m.cutAll()
		m.list = nil
		m.version++
	case m.items-m.saved >= m.size/2: // it would have nothing of what is held
	case n == 11: // a restart from the snapshot
		was = "from snapshot"
		m.cutAll()
		m.list = slices.Clone(m.snapshot)
		m.version++
		if m.IntN(3) == 0 {
			p.die()
		}
	}
	after := m.held()
	for key := range before {
		if !after[key] {
			m.dead[key] = true
		}
	}
}

func (m *model) cutAll() {
	for _, p := range m.processes {
		p.cut()
		p.pending = nil
	}
}

// held returns the keys that are in the list, in a log, or on the way.
func (m *model) held() map[string]bool {
	held := map[string]bool{}
	for _, item := range m.list {
		id, _, _ := strings.Cut(item, " ")
		held[keyOf(id)] = true
	}
	for _, p := range m.processes {
		for _, c := range p.pending {
			held[keyOf(c.id)] = true
		}
		for _, msg := range p.queue {
			if msg[0] == "chat:id" {
				held[keyOf(msg[1])] = true
			}
		}
		if p.room != nil {
			for _, e := range p.room.log.entries() {
				held[keyOf(e.id)] = true
			}
		}
	}
	return held
}

// push is what a post does in Redis; it returns the answer of RPUSH.
func (m *model) push(e entry) int64 {
	key := keyOf(e.id)
	if _, again := m.at[key]; !again {
		m.at[key], m.pushed[key], m.listed[key] = m.clock, m.lines, m.items
		m.place[key] = len(m.order)
		m.order = append(m.order, key)
	}
	m.list = append(m.list, e.id+" "+e.line)
	length := int64(len(m.list))
	m.trim()
	m.version++
	m.lines++
	m.items++
	m.publish("chat:id", e.id)
	m.publish("chat", e.line)
	return length
}

func (m *model) trim() { m.list = m.list[max(0, len(m.list)-listSize(m.size)):] }

func (m *model) publish(channel, text string) {
	for _, p := range m.processes {
		if p.subscribed {
			p.queue = append(p.queue, [2]string{channel, text})
		}
	}
}

func (m *model) parsed() []entry {
	raw := make([]any, len(m.list))
	for i, item := range m.list {
		raw[i] = []byte(item)
	}
	list, _, _ := parseList(raw, nil)
	return list
}

// A modelProcess does what broker does, one round trip at a time.
type modelProcess struct {
	*model
	room       *room // nil while it is dead
	frozen     int   // the step at which it goes on
	stay       int   // number of the connections to Redis
	subscribed bool
	queue      [][2]string // what the subscription has not read yet
	f          *feed       // nil until the list is read
	follows    bool
	underWay   bool
	log, items []entry // to be written
	watched    int
	pending    []modelCommand
}

// A modelCommand is a post that is on its way to Redis.
type modelCommand struct {
	entry
	stay  int
	least int64
}

func (p *modelProcess) die() {
	p.cut()
	if p.room != nil {
		p.room.log.close()
		p.room = nil
	}
}

// cut ends the connections. What was sent may still be run.
func (p *modelProcess) cut() {
	p.stay++
	p.subscribed, p.queue, p.f, p.follows, p.items = false, nil, nil, false, nil
	if p.room != nil {
		p.room.broker.setAway(errForgot)
	}
	p.pending = slices.DeleteFunc(p.pending, func(modelCommand) bool { return p.IntN(2) == 0 })
}

func (p *modelProcess) step(faults bool) {
	if faults && p.clock < p.frozen {
		return
	}
	switch {
	case p.room == nil:
		if !faults || p.IntN(10) == 0 {
			l := newLog(p.size, p.size)
			cfg := &config{redis: &url.URL{}, channel: "chat", key: "key"}
			p.room = &room{log: l, broker: newBroker(cfg, l, func(string, ...any) {}, nil), onWay: map[string]chan struct{}{}}
		}
	case !p.subscribed:
		p.subscribed = !faults || p.IntN(4) == 0
	case p.follows:
		p.follow()
	case p.items == nil:
		p.readList()
	case p.watched != p.version: // EXEC does nothing
		p.items = nil
	default:
		p.writeList(faults)
	}
}

func (p *modelProcess) readList() {
	if p.f == nil {
		p.f = newFeed(p.room.log, "chat")
	}
	p.f.questions = p.room.broker.questions()
	list, raw := p.parsed(), len(p.list)
	p.publish("chat:probe", p.f.word)
	p.trace("process %d reads list %v mine %v", p.pn(p), brief(list), brief(p.room.log.entries()))
	if p.f.take(list, raw) {
		p.follows, p.underWay = true, true
		return
	}
	p.log, p.items = p.f.restore(p.parsed()) // under WATCH
	p.watched = p.version
	if p.keeps {
		p.fail("the list is written though Redis forgot nothing")
	}
}

func (p *modelProcess) writeList(faults bool) {
	p.f.questions = p.room.broker.questions()
	p.list = nil
	for _, e := range p.items {
		p.list = append(p.list, e.id+" "+e.line)
		if _, again := p.at[keyOf(e.id)]; !again {
			p.at[keyOf(e.id)] = p.clock
		}
	}
	p.trace("process %d writes %v", p.pn(p), brief(p.items))
	p.version++
	p.writes++
	p.model.items++ // the gap
	p.publish("chat:probe", rewritten+p.f.word)
	if faults && p.IntN(10) == 0 { // the answer is lost
		p.cut()
		return
	}
	p.f.begin(p.log, rewritten+p.f.word, len(p.items), false)
	p.follows, p.underWay, p.items = true, true, nil
}

func (p *modelProcess) follow() {
	b := p.room.broker
	if !p.underWay && (len(b.asking) > 0 || p.IntN(20) == 0) {
		least := p.f.least()
		p.f.questions = b.questions()
		p.trim()
		length := int64(len(p.list))
		p.publish("chat:probe", p.f.word)
		p.underWay = true
		if length < least {
			p.cut()
			return
		}
	}
	for range 1 + p.IntN(4) {
		if len(p.queue) == 0 {
			return
		}
		msg := p.queue[0]
		p.queue = p.queue[1:]
		p.trace("process %d hears %v", p.pn(p), msg)
		if err := p.f.hear(msg[0], msg[1]); err != nil {
			p.cut()
			return
		}
		if len(p.f.echo) > 0 {
			<-p.f.echo
			p.underWay = false
			b.settle(p.f.questions)
			b.setJoined()
		}
	}
}

// execute runs a post that has come to Redis.
func (p *modelProcess) execute(faults bool) {
	if len(p.pending) == 0 {
		return
	}
	c := p.pending[0]
	p.pending = p.pending[1:]
	if p.tooLate(keyOf(c.id)) {
		return
	}
	length := p.push(c.entry)
	p.trace("process %d pushes %v (stay %v) length %d least %d", p.pn(p), brief([]entry{c.entry}), c.stay == p.stay, length, c.least)
	if c.stay == p.stay && (length <= c.least || faults && p.IntN(50) == 0) {
		p.cut()
	}
}

// tooLate tells whether a second copy would come so far behind the first that it would be shown:
// the list is told, not kept, to have no such.
func (m *model) tooLate(key string) bool {
	first, again := m.listed[key]
	return again && m.items-first > m.size/8
}

// A modelClient sends a message until it is accepted.
type modelClient struct {
	*model
	key string
	at  *modelProcess // where it is waiting
	to  *room
}

func (c *modelClient) step(end int) {
	if c.key == "" {
		if c.next >= end {
			return
		}
		c.key = c.name()
	}
	if c.at != nil && c.at.room == c.to && c.to.log.idOf(c.key) != "" {
		c.accept()
		return
	}
	if c.at != nil && c.at.room == c.to && c.IntN(c.patience) > 0 {
		return
	}
	c.at = c.processes[c.IntN(len(c.processes))]
	if c.to = c.at.room; c.to == nil || c.to.away() != nil {
		c.at = nil
		return
	}
	switch {
	case c.to.log.idOf(c.key) != "":
		c.accept()
	case c.tooLate(c.key):
		c.key, c.at = "", nil // nobody waits so long
	default:
		c.at.pending = append(c.at.pending, modelCommand{entry{newID(c.key), "[12:00:00] x: " + c.key}, c.at.stay, c.at.f.least()})
	}
}

func (c *modelClient) accept() {
	c.accepted[c.key] = true
	c.key, c.at = "", nil
}

// A modelReader goes from process to process with the last id that it has.
type modelReader struct {
	*model
	polls bool
	at    *modelProcess
	to    *room
	cur   cursor
	after string

	begun   int // the step of its first answer
	last    int // place of the newest message
	lastRaw int // of which so many lines had been published before
	fresh   bool
	seen    map[string]bool
	since   map[string]bool // ids since the last gap
	gapAt   int
	copied  int // the step at which it was told something again without a gap
}

func (r *modelReader) step(faults bool) {
	if r.at == nil || r.at.room != r.to || faults && r.IntN(60) == 0 {
		r.at = r.processes[r.IntN(len(r.processes))]
		if r.to = r.at.room; r.to == nil {
			r.at = nil
			return
		}
		r.cur = cursor{after: r.after}
	}
	if faults && r.clock < r.at.frozen {
		return
	}
	if r.polls {
		r.poll()
		return
	}
	for reads := 0; ; reads++ {
		n := r.to.next(&r.cur)
		if n.unknown {
			return
		}
		if reads > 1000 {
			r.fail("a reader does not come to an end")
			return
		}
		r.hears(n.frames)
		if !n.more {
			r.after = cmpOr(r.to.log.before(&r.cur), r.after)
			return
		}
	}
}

func cmpOr(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

// poll is one answer to ?wait=0, by the real stream, once the place is known.
func (r *modelReader) poll() {
	ahead := r.cur
	n := r.to.next(&ahead)
	if n.unknown {
		r.cur.asked = ahead.asked
		return
	}
	conn := &modelConn{}
	(&stream{room: r.to, conn: conn, poll: true, at: r.cur, head: []byte{}}).run()
	_, frames, _ := bytes.Cut(conn.Bytes(), []byte("\n")) // behind retry:
	r.hears(frames)
	r.at = nil
}

// A modelConn keeps what is written.
type modelConn struct {
	net.Conn
	bytes.Buffer
}

func (c *modelConn) Write(b []byte) (int, error) {
	if c.Len() > 1<<20 {
		return 0, net.ErrClosed
	}
	return c.Buffer.Write(b)
}
func (c *modelConn) Read(b []byte) (int, error)       { return c.Buffer.Read(b) }
func (c *modelConn) SetWriteDeadline(time.Time) error { return nil }

// hears takes in frames as a client does.
func (r *modelReader) hears(frames []byte) {
	if r.begun < 0 {
		r.begun = r.clock
	}
	for block := range strings.SplitSeq(string(frames), "\n\n") {
		id, gap := "", false
		for line := range strings.Lines(block) {
			line = strings.TrimSuffix(line, "\n")
			if rest, ok := strings.CutPrefix(line, "id: "); ok {
				id = rest
			}
			gap = gap || line == "event: gap"
		}
		r.after = cmpOr(id, r.after)
		switch {
		case gap:
			r.gap()
		case strings.Contains(block, "data: ["):
			r.message(id)
		}
	}
}

func (r *modelReader) gap() {
	if lag := r.lines - r.lastRaw; r.keeps && lag <= r.size {
		r.fail("a gap was told to who is %d lines behind, in a room that remembers %d", lag, r.size)
	}
	r.trace("reader %d hears gap at %d", slices.Index(r.readers, r), r.pn(r.at))
	r.gaps++
	r.gapAt, r.fresh, r.since = r.clock, true, nil
}

func (r *modelReader) message(id string) {
	key := keyOf(id)
	r.trace("reader %d at %d hears %s", slices.Index(r.readers, r), r.pn(r.at), key)
	if r.since == nil {
		r.since = map[string]bool{}
	}
	if r.since[id] {
		r.copied = r.clock
	}
	r.since[id], r.seen[key] = true, true
	if !r.keeps {
		return
	}
	place := r.place[key]
	if place != r.last+1 && !r.fresh {
		r.fail("after message %d of the order came %d", r.last, place)
	}
	r.last, r.lastRaw, r.fresh = place, r.pushed[key], false
}

func (r *modelReader) judge(i int) {
	if r.keeps && r.last != len(r.order)-1 {
		r.fail("reader %d (polls %v) ends at message %d of %d", i, r.polls, r.last, len(r.order))
	}
	if r.copied > r.gapAt {
		r.fail("reader %d was told something twice at step %d, and no gap since %d", i, r.copied, r.gapAt)
	}
	for key := range r.accepted {
		if !r.seen[key] && !r.dead[key] && r.at0(key) >= r.begun && r.gapAt < r.at0(key) {
			r.fail("reader %d (polls %v) was not told %s, of step %d, nor a gap since; the last was at %d", i, r.polls, key, r.at0(key), r.gapAt)
		}
	}
}

func (m *model) at0(key string) int { return m.at[key] }

// over tells whether nothing is left to do.
func (m *model) over() bool { return m.unrest() == "" }

func (m *model) unrest() string {
	for i, p := range m.processes {
		if p.room == nil || p.room.away() != nil || len(p.pending) > 0 || len(p.queue) > 0 {
			return fmt.Sprintf("process %d is not joined or has not read all", i)
		}
	}
	for _, c := range m.clients {
		if c.key != "" {
			return c.key + " is not accepted"
		}
	}
	for i, r := range m.readers {
		live := slices.ContainsFunc(m.processes, func(p *modelProcess) bool { return p.room == r.to })
		if r.to == nil || !live || r.after != cmpOr(r.to.log.newestID(), r.after) {
			return fmt.Sprintf("reader %d (polls %v) is not at the end", i, r.polls)
		}
	}
	return ""
}

func (l *Log) newestID() string {
	all := l.entries()
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1].id
}

// compare sees that all logs hold the newest of the list.
func (m *model) compare() {
	want, copied := []string(nil), map[string]bool{}
	for i, e := range m.parsed() {
		if !copied[keyOf(e.id)] && i >= len(m.list)-m.size {
			want = append(want, e.id)
		}
		copied[keyOf(e.id)] = true
	}
	for i, p := range m.processes {
		var got []string
		for _, e := range p.room.log.entries() {
			if _, foreign := e.base(); !foreign {
				got = append(got, e.id)
			}
		}
		n := min(len(got), len(want))
		if !slices.Equal(got[len(got)-n:], want[len(want)-n:]) || n < min(m.size/2, len(want)) || len(got) != len(want) && len(m.list) < m.size && p.room.log.held() < m.size {
			m.fail("process %d holds %q, and the list %q", i, got, want)
		}
	}
}
