/*
Chat is a web chat room in one program.

	chat                            a room in this process, at http://localhost:8989
	chat -redis localhost:6379      the same room on every process that shares this Redis

People log in with a name, write, and read what everybody writes. A browser sends with POST
and receives by server-sent events (the HTML standard, section 9.2); between processes the
messages travel through Redis PUBLISH and SUBSCRIBE.

# Flags

	-addr host:port      address to listen on (default ":8989")
	-redis server        share the room: host:port, or a redis:// or rediss:// URL;
	                     when absent, $REDIS_URL; when that is empty, a room in memory
	-channel name        Redis channel of the room (default "chat")
	-history n           messages that a newcomer gets, at most 4096 (default 200)
	-rate n              messages a second for one sender after a burst of 10; 0 is no limit,
	                     neither here nor on logging in (default 5)
	-origin url          origin to trust, behind a proxy that changes the Host header
	-version             print the version and exit
	-h                   print the flags and exit

	$CHAT_KEY            key that signs the session cookies (default: drawn at random, and
	                     shared through Redis)
	$CHAT_PASSWORD       password of the room (default: none, the room is open)

# HTTP

	GET  /               the chat page (?view=projector: in big type, to read only); without a
	                     session 303 to /login
	GET  /login          the form; POST it with user= (and password=): 303 and a cookie
	POST /logout         303, the cookie gone
	POST /post           message=: 204 when the message is in the room. With an Idempotency-Key
	                     header (16 to 64 of A-Z a-z 0-9 _ -) the same key is the same message,
	                     while it is among the newest 4096. Else the first that holds of: 403
	                     from another site's page, 401 no session, 415 not a form, 413 over
	                     64 KiB, 400 a broken form or key, 422 no text, 413 over 4000 characters,
	                     429 too fast, 503 not sure that it is in the room
	GET  /stream         recent messages, then live ones, as text/event-stream. After the id in
	                     Last-Event-ID (or ?after=): just what follows it, from any process.
	                     ?wait=25s ends after the first messages, or 25 s (long polling; at most
	                     a minute); ?wait=0 ends at once (polling)
	GET  /lesson         the three ways to receive, side by side
	GET  /healthz        200 ok, or 503 and why
	GET  /assets/...     style, scripts and icons of the pages

Behind a proxy on the same machine, X-Forwarded-For tells whose address counts; from any proxy,
X-Forwarded-Proto: https makes the cookie Secure.

A message on the stream is

	id: 4VXCQ6ZTJ5MHN3D2KAEWRYB7UF
	data: [12:34:56] 小明: 你好

with a data line for each line of the text, and the time of the process. An answer begins with
retry:, the milliseconds after which to come back. Three more events have a name and empty data:
ping (up to date, with the id as of which; again after a gap, and without the id after 15 s of
silence), wait (the id you came with is not known here yet; until it is, a ping only shows that
the connection lives) and gap (what follows does not join what you had).

# Redis

	channel chat         the line and nothing else: [12:34:56] 小明: 你好
	channel chat:id      the id of the line that comes next on chat
	channel chat:probe   proof that what is published here comes back: a random word of each
	                     process. "rewritten " before it, or alone, says that the list or the
	                     key was written back, and the other processes join again
	list    chat:history id, space, line; the newest 4096, newest last
	string  chat:key     the key of the cookies: the time it was drawn in 16 hex digits, a dash, a
	                     random word; of two the older is the room's

What other programs publish on chat is shown too. A line break of the text is U+2028 in Redis.

# What is kept

Nothing on disk. The newest 4096 messages live in each process, and in the Redis list. The
browser keeps the cookie chat_session for 30 days: v1, the key's id, expiry, a random id of the
login, the name (base64url) and a MAC over these, between dots. It is signed, not secret.

# Reading order

The file is told from the outside in: start (run, configure), the log (Log), frames and cleaning
(encode, clean), sessions (signer), limits (limiter), Redis (broker), the server and its handlers
(server), the stream (stream.run). The idea is in Log: a message is encoded once, readers are
positions in one ring, and an id names a message, so whoever has it drops a copy.
*/
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"log"
	"math"
	mathrand "math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
)

const (
	ringSize   = 4096     // messages that the log, the Redis list and the memory of ids hold
	pageSize   = 16 << 10 // bytes of frames that lie side by side and are written at once
	maxName    = 24       // code points of a name
	maxMessage = 4000     // code points of a message
	maxLine    = 4100     // code points of a line from Redis; time, name and message fit
	maxBody    = 64 << 10 // bytes of a form
	maxHeader  = 16 << 10 // bytes of a request's header

	postBurst  = 10  // messages of one sender at once; then -rate a second
	loginBurst = 400 // logins from one address at once,
	loginRate  = 5   // and then so many a second
	guessBurst = 20  // wrong passwords from one address at once,
	guessRate  = 1   // and then so many a second

	headerTimeout  = 10 * time.Second // for the header of a request to come,
	requestTimeout = 20 * time.Second // and for the whole request
	answerTimeout  = 30 * time.Second // from the header to the end of an answer that is no stream
	idleTimeout    = 75 * time.Second // longer than a proxy's usual minute: the proxy closes first

	heartbeat    = 15 * time.Second       // silence after which every stream gets a ping
	writeTimeout = 30 * time.Second       // for a reader to take one page
	writeRenew   = 15 * time.Second       // how late a write's deadline may be, to set it rarely
	sendBuffer   = 24 << 10               // bytes the kernel keeps for a reader; Linux doubles it
	unknownGrace = 2 * time.Second        // how long an unknown id may be on its way from Redis
	maxAsked     = 1000                   // unknown ids of polls that are remembered,
	askedFor     = time.Minute            // for so long
	maxWait      = time.Minute            // longest ?wait=
	maxPoll      = 64 << 10               // bytes after which a long poll ends though there is more
	retryLow     = 1000                   // ms after which readers of a process that ends come back,
	retryHigh    = 4000                   // spread up to this
	pollRetry    = 2000                   // ms between polls
	longLow      = 200                    // ms between long polls,
	longHigh     = 400                    // spread up to this
	sessionLife  = 30 * 24 * time.Hour    // of a cookie
	stopTimeout  = 400 * time.Millisecond // what shutdown leaves to answers under way

	confirmTimeout = 2 * time.Second             // from POST to the message coming back
	redisTimeout   = 2 * time.Second             // dial, one write, and one reply
	listTimeout    = 10 * time.Second            // the whole history, which may be 64 MB
	redisSilence   = 5 * time.Second             // silence after which a probe goes out
	probeTimeout   = 2 * time.Second             // within which it must come back
	minBackoff     = 100 * time.Millisecond      // between attempts to join, doubling to
	maxBackoff     = 2 * time.Second             // this, each half as long to half as long again
	keyGrace       = redisSilence + redisTimeout // for an older cookie key to come back; see shareKey
	restoreTries   = 5                           // of writing the list back against others
	batchSize      = 64                          // posts that share one round trip to Redis

	spareFiles = 24          // descriptors that connections must leave: Redis, its redial, the listener
	busyConns  = 8           // connections kept to answer 503 when all others are taken
	fullPause  = time.Minute // between two words in the log that all are taken
)

//go:embed assets
var assets embed.FS

func main() {
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads must not end the room
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "chat: %v\n", err)
		if _, usage := errors.AsType[usageError](err); usage {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// run is the whole program: it serves the room until ctx ends, then returns nil. A mistake in
// args or the environment is a usageError.
//
// When ctx ends the log closes, which ends every stream; requests see their context end; what is
// left after stopTimeout is cut off.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg, err := configure(args, getenv, stdout)
	if err != nil || cfg == nil {
		return err
	}
	s, err := newServer(cfg, log.New(stderr, "", log.LstdFlags).Printf)
	if err != nil {
		return err
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", cfg.addr)
	if err != nil {
		other := ":8990"
		if strings.HasSuffix(cfg.addr, other) {
			other = ":8991"
		}
		return fmt.Errorf("listening on %s: %w; choose another address, such as -addr %s",
			cfg.addr, cause(err), other)
	}
	s.urls = roomURLs(ln.Addr())
	fmt.Fprintf(stdout, "chat: open %s\n", strings.Join(s.urls, " or "))
	fmt.Fprintf(stdout, "chat: %s\n", cfg.where())

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var redisDone sync.WaitGroup
	if s.broker != nil {
		redisDone.Go(func() { s.broker.run(ctx) })
	}
	srv := s.httpServer(ctx)
	served := make(chan error, 1)
	go func() {
		served <- srv.Serve(ln)
		cancel() // when nobody asked it to, the listener broke
	}()
	<-ctx.Done()
	s.shutdown(srv)
	redisDone.Wait()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// A config is what flags and environment say.
type config struct {
	addr, channel string
	redis         *url.URL // nil: a room in memory
	history       int
	rate          float64
	origins       http.CrossOriginProtection
	key, password string
}

// A usageError is a mistake in how the program was called. It never contains an argument that
// may hold a password.
type usageError struct{ error }

func (e usageError) Error() string { return e.error.Error() + " (chat -h lists the flags)" }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// configure reads flags and environment. It returns nil and no error when the answer was to
// print the manual or the version.
func configure(args []string, getenv func(string) string, stdout io.Writer) (*config, error) {
	c := &config{key: getenv("CHAT_KEY"), password: getenv("CHAT_PASSWORD")}
	flags := flag.NewFlagSet("chat", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&c.addr, "addr", ":8989", "address to listen on, `host:port`")
	server := flags.String("redis", "", "`server` that shares the room: host:port, or a redis:// or rediss:// URL\n"+
		"(default $REDIS_URL; when that is empty, a room in memory)")
	flags.StringVar(&c.channel, "channel", "chat", "Redis channel `name` of the room")
	flags.IntVar(&c.history, "history", 200, "messages that a newcomer gets, at most 4096")
	flags.Float64Var(&c.rate, "rate", 5, "messages a second for one sender after a burst of 10;\n"+
		"0 is no limit, neither here nor on logging in")
	origin := flags.String("origin", "", "origin `url` to trust, behind a proxy that changes the Host header")
	version := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, "Usage: chat [flags]\n\nA web chat room; open the address it prints.\n\n")
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		fmt.Fprint(stdout, "\nEnvironment: CHAT_KEY signs the session cookies, CHAT_PASSWORD closes the room.\n")
		return nil, nil
	} else if err != nil {
		return nil, usagef("%s", strings.ReplaceAll(redact(err.Error()), "\n", " "))
	}
	if flags.NArg() > 0 {
		return nil, usagef("unexpected argument %q; an address goes behind -addr, as in -addr :8990",
			redact(flags.Arg(0)))
	}
	if *version {
		fmt.Fprintln(stdout, versionLine())
		return nil, nil
	}
	var err error
	if text := cmp.Or(*server, getenv("REDIS_URL")); text != "" {
		if c.redis, err = parseRedis(text); err != nil {
			return nil, err
		}
	}
	if *origin != "" && c.origins.AddTrustedOrigin(*origin) != nil {
		return nil, usagef("-origin wants scheme://host[:port], not %q", redact(*origin))
	}
	return c, c.check()
}

// check refuses values that cannot work.
func (c *config) check() error {
	if host, _, ok := splitAddr(c.addr); !ok || strings.ContainsAny(host, "@/ ") {
		return usagef("-addr wants host:port or :port, not %q", redact(c.addr))
	}
	if c.history < 0 || c.history > ringSize {
		return usagef("-history wants 0 to %d, not %d", ringSize, c.history)
	}
	if !(c.rate >= 0) || math.IsInf(c.rate, 0) || c.rate > 0 && c.rate < 0.001 {
		return usagef("-rate wants messages a second, or 0 for no limit, not %v", c.rate)
	}
	if strings.HasSuffix(c.channel, ":id") || strings.HasSuffix(c.channel, ":probe") {
		return usagef("-channel wants a name that does not end like a channel beside another: %q", redact(c.channel))
	}
	odd := func(r rune) bool { return !unicode.IsGraphic(r) || r == ' ' }
	if c.channel == "" || strings.ContainsFunc(c.channel, odd) {
		return usagef("-channel wants a name without spaces, not %q", redact(c.channel))
	}
	return nil
}

// splitAddr splits host:port, where port is a number.
func splitAddr(addr string) (host, port string, ok bool) {
	host, port, err := net.SplitHostPort(addr)
	_, bad := strconv.ParseUint(port, 10, 16)
	return host, port, err == nil && bad == nil
}

// parseRedis reads the value of -redis. Its errors do not repeat the value, which may hold a
// password.
func parseRedis(text string) (*url.URL, error) {
	bad := usagef("-redis (or REDIS_URL) wants host:port or a redis:// or rediss:// URL, such as localhost:6379")
	if !strings.Contains(text, "://") {
		host, port, ok := splitAddr(text)
		if !ok {
			return nil, bad
		}
		text = "redis://" + net.JoinHostPort(cmp.Or(host, "localhost"), port)
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "redis" && u.Scheme != "rediss" || u.Opaque != "" || u.Hostname() == "" {
		return nil, bad
	}
	_, _, portOK := splitAddr(u.Host)
	_, dbErr := strconv.ParseUint(cmp.Or(strings.TrimPrefix(u.Path, "/"), "0"), 10, 16)
	// A password with an unescaped # or ? ends up in the parts that are not the user's.
	if u.Port() != "" && !portOK || dbErr != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, bad
	}
	return u, nil
}

// redact hides what stands where a URL has user and password.
func redact(s string) string {
	at := strings.LastIndexByte(s, '@')
	if at < 0 {
		return s
	}
	start := 0
	if i := strings.Index(s[:at], "//"); i >= 0 {
		start = i + 2
	}
	return s[:start] + "…" + s[at:]
}

// where says in a few words where the room lives.
func (c *config) where() string {
	if c.redis == nil {
		return "room in memory; it ends with this process"
	}
	shown := url.URL{Scheme: c.redis.Scheme, Host: c.redis.Host, Path: c.redis.Path}
	return fmt.Sprintf("room shared through %s, channel %q", shown.String(), c.channel)
}

func versionLine() string {
	version, commit := "(devel)", ""
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "chat " + version
	}
	version = cmp.Or(info.Main.Version, version)
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			commit = ", commit " + s.Value
		}
	}
	return "chat " + version + commit + ", " + info.GoVersion
}

// cause strips the address, the system call and the name server from a network error.
func cause(err error) error {
	if sys, ok := errors.AsType[*os.SyscallError](err); ok {
		return sys.Err
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return errors.New(dns.Err)
	}
	return err
}

// A Log holds the newest messages of the room, encoded once, in one order. Readers are cursors:
// each holds a position and reads on from there, so a newcomer, a reader that comes back, a slow
// one and a live one are the same, and no reader costs the log anything.
//
// Whoever waits, waits on a channel that is closed at the next event. An id names one message:
// a second one under the same id is dropped.
type Log struct {
	history int           // messages a newcomer gets
	grace   time.Duration // how long an unknown id may be on its way; 0 in memory

	mu     sync.Mutex        // guards all below, and the pages' ends; what is in a page stays
	ring   []entry           // the entry at position p is ring[p%ringSize]
	oldest uint64            // position of the oldest entry held
	next   uint64            // position of the next entry
	index  map[string]uint64 // id of each message held → its position
	newest string            // id of the newest announced message, or "0"; outlives the ring
	count  int               // announced messages held
	page   *page             // where the next frame goes
	wake   chan struct{}     // closed and replaced at each message, join, heartbeat, and the end
	beat   *time.Timer       // wakes everybody after silence
	joined time.Time         // since when messages flow; zero while Redis is away
	begun  bool              // it was joined once, so its history is the room's
	closed bool

	asked      map[string]time.Time // unknown id → when a poll first asked for it
	askedSince time.Time            // when asked was last begun anew
}

// An entry is a message, or a gap if it has no id.
type entry struct {
	message
	page   *page
	off    int  // of its frame in the page
	unsure bool // elsewhere other messages may come before it; see merge
}

// A message is a line of the room, its line breaks LF, under its id.
type message struct{ id, line string }

// announced tells a message that an id announced from one that another program published; the
// id of such a foreign message has a dot, which no Idempotency-Key can have.
func (m message) announced() bool { return m.id != "" && !strings.Contains(m.id, ".") }

// A page is a stretch of frames in memory. It is only ever appended to, within its capacity,
// so what a reader got of it stays as it was.
type page struct {
	buf  []byte
	next uint64 // position after the page's last entry
}

// A cursor is the place of one reader.
type cursor struct {
	pos   uint64 // position to read next
	fresh uint64 // gaps before this position are none to this reader: it came later, or was told
}

// lost is the position of a reader whose place is not in the log.
const lost = math.MaxUint64

// newLog returns an empty log. Nobody gets anything from it until join is called.
func newLog(history int, grace time.Duration) *Log {
	l := &Log{history: history, grace: grace, ring: make([]entry, ringSize),
		index: map[string]uint64{}, newest: "0", wake: make(chan struct{})}
	l.beat = time.AfterFunc(heartbeat, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.broadcast()
	})
	return l
}

// broadcast wakes everybody who waits. The caller holds mu.
func (l *Log) broadcast() {
	close(l.wake)
	l.wake = make(chan struct{})
	if !l.closed {
		l.beat.Reset(heartbeat)
	}
}

// at returns the entry at a position that is held. The caller holds mu.
func (l *Log) at(pos uint64) *entry { return &l.ring[pos%ringSize] }

// add puts a message, or a gap, at the end. The caller holds mu, has seen that the id is not
// known, and wakes the readers.
func (l *Log) add(m message) {
	if l.next-l.oldest == ringSize {
		old := l.at(l.oldest)
		delete(l.index, old.id)
		if old.announced() {
			l.count--
		}
		l.oldest++
	}
	// A gap has a page of its own, so that it can be left out.
	frame, size := gapFrame, len(gapFrame)
	if m.id != "" {
		frame = encode(m)
		size = max(pageSize, len(frame))
		l.index[m.id] = l.next
	}
	if m.announced() {
		l.newest = m.id
		l.count++
	}
	if l.page == nil || m.id == "" || len(l.page.buf)+len(frame) > cap(l.page.buf) {
		l.page = &page{buf: make([]byte, 0, size)}
	}
	*l.at(l.next) = entry{message: m, page: l.page, off: len(l.page.buf)}
	l.page.buf = append(l.page.buf, frame...)
	l.next++
	l.page.next = l.next
}

// append adds the message unless its id is known.
func (l *Log) append(m message) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, known := l.index[m.id]; !known {
		l.add(m)
		l.broadcast()
	}
}

// merge takes in what the first upTo messages of the room's list in Redis hold and this log
// lacks, and reports whether the list has every announced message of the log. What stands in
// the list before all that is known here is older than this log, and stays out.
//
// A gap comes first when the log has missed something for good: when its newest message is not
// in the list (an empty one was forgotten and says nothing), when it has only foreign lines and
// the list is full, so that its head may be lost, or when it lacks a message that stands before
// one it has. Then the processes disagree on what comes before the messages taken, unless the log
// was just away for a whole list, and a reader that comes with one of their ids has to be told as
// well.
func (l *Log) merge(list []message, upTo int) (complete bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.broadcast()
	// All is looked up before anything is added, since adding pushes the oldest out.
	listed, met, gap := map[string]bool{}, false, false
	var missing []message
	for i, m := range list {
		_, known := l.index[m.id]
		known = known || m.id == l.newest // which foreign lines may have pushed out
		switch {
		case listed[m.id] || !known && i >= upTo: // a second attempt of the same post, or not yet
		case known && !met:
			met, missing = true, nil
		case known:
			gap = gap || len(missing) > 0
		default:
			missing = append(missing, m)
		}
		listed[m.id] = true
	}
	if len(list) > 0 && !listed[l.newest] {
		gap = gap || l.newest != "0" || l.next > 0 && len(list) >= ringSize
	}
	switch {
	case l.next == 0 && len(list) >= ringSize:
		l.next, l.oldest = 1, 1 // a full list may have lost its head: cursor 0 is before it
	case gap && l.at(l.next-1).id != "":
		l.add(message{})
	}
	for _, m := range missing {
		l.add(m)
		l.at(l.next - 1).unsure = gap && len(list) < ringSize
	}
	return l.covered(listed, len(list) >= ringSize)
}

// covered tells whether the list has every announced message of the log. A full list has no
// room for what is older than the first one that both have. The caller holds mu.
func (l *Log) covered(listed map[string]bool, full bool) bool {
	met := !full
	for pos := l.oldest; pos < l.next; pos++ {
		m := l.at(pos)
		met = met || listed[m.id]
		if met && m.announced() && !listed[m.id] {
			return false
		}
	}
	return true
}

// posted returns the announced messages held, oldest first.
func (l *Log) posted() []message {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := make([]message, 0, l.count)
	for pos := l.oldest; pos < l.next; pos++ {
		if m := l.at(pos).message; m.announced() {
			list = append(list, m)
		}
	}
	return list
}

// size returns how many announced messages are held.
func (l *Log) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

// join says that messages flow from now on.
func (l *Log) join() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.joined, l.begun = time.Now(), true
	l.broadcast()
}

// leave says that they do not until the next join. There is nothing new in that for anybody.
func (l *Log) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.joined = time.Time{}
}

// close ends every reader once it has read to the end.
func (l *Log) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.beat.Stop()
	l.broadcast()
}

// has tells whether the message is here, and returns the channel to wait on if it is not.
func (l *Log) has(id string) (known bool, wake <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, known = l.index[id]
	return known, l.wake
}

// firstAsked returns since when polls have asked for an id that is not known. A poll ends before
// it can wait for it; without this memory the next one would begin to wait anew, for ever. Beyond
// maxAsked ids in askedFor it returns the zero time: such an id is given up at once, so that whoever
// makes ids up makes nobody wait, at the price of a gap that may be none.
func (l *Log) firstAsked(id string) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.askedSince) > askedFor {
		l.asked, l.askedSince = map[string]time.Time{}, time.Now()
	}
	if _, again := l.asked[id]; !again && len(l.asked) < maxAsked {
		l.asked[id] = time.Now()
	}
	return l.asked[id]
}

// later tells whether the message id is here and comes after the other, or the other is not.
func (l *Log) later(id, other string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	pos, known := l.index[id]
	otherPos, otherKnown := l.index[other]
	return known && (!otherKnown || pos > otherPos)
}

// A place is what the log says of an id that a reader came with.
type place struct {
	cursor cursor
	known  bool
	next   uint64          // position of the message that comes next
	joined time.Time       // since when the log is joined; zero while it is not
	wake   <-chan struct{} // to wait on if it is not known; nil when the log is closed
}

// find looks up where a reader goes on: after the message it names, at the beginning for "0",
// with the history for "". A foreign message that is not known here is looked for by the
// announced one before it. What cannot be an id has no place, which is known at once; nothing
// is known before the first join.
func (l *Log) find(id string) place {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := place{next: l.next, joined: l.joined, wake: l.wake}
	if l.closed {
		p.wake = nil
	}
	base, rest, _ := strings.Cut(id, ".")
	pos, exact := l.index[id]
	basePos, near := l.index[base]
	switch {
	case !l.begun:
	case id == "":
		p.cursor, p.known = l.recent(), true
	case exact && l.at(pos).unsure,
		!exact && near && l.at(basePos).unsure && rest != hadGapBefore && rest != hadGapBehind:
		p.cursor.pos, p.known = lost, true
	case exact:
		p.cursor, p.known = cursor{pos: pos + 1}, true
	case id == "0":
		p.known = true
	case !validID(id):
		p.cursor.pos, p.known = lost, true
	case near && rest == hadGapBehind:
		p.cursor, p.known = cursor{pos: basePos + 1, fresh: basePos + 2}, true
	case near:
		p.cursor, p.known = cursor{pos: basePos + 1}, true
	case base == "0":
		p.known = true
	}
	return p
}

// Behind a dot after an id, these say which gap its reader has had, so that it is not told again
// each time it comes back. They look like a foreign line's id, which no log holds, so that where
// there is no such gap the reader just goes on after the message. (A gap behind a foreign line is
// told again: its id has no room for more.)
const (
	hadGapBefore = "aaaaaaaa" // the one before an unsure message
	hadGapBehind = "bbbbbbbb" // the one behind any announced message
)

// recent is a newcomer's cursor, before the newest messages. The caller holds mu.
func (l *Log) recent() cursor {
	pos := l.next
	for n := 0; pos > l.oldest && n < l.history; pos-- {
		if l.at(pos-1).id != "" {
			n++
		}
	}
	return cursor{pos: pos, fresh: l.next}
}

// read returns the next frames, at most a page, and moves the cursor behind them. A reader that
// fell off the ring's end gets the gap, and goes on as a newcomer. With wake the reader is at
// the end and waits there; woken for nothing, it was the heartbeat or a join. Without frames and
// wake the log is closed.
func (l *Log) read(c *cursor) (frames []byte, wake <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.pos < l.oldest || c.pos > l.next {
		*c = l.recent()
		return gapFrame, nil
	}
	for c.pos < min(l.next, c.fresh) && l.at(c.pos).id == "" {
		c.pos++
	}
	if c.pos < l.next {
		e := l.at(c.pos)
		frames, c.pos = e.page.buf[e.off:], e.page.next
	}
	if c.pos == l.next && !l.closed {
		wake = l.wake
	}
	return frames, wake
}

// before returns the id with which a reader at the cursor comes back: of the newest message before
// it, with a mark if the reader was told a gap there; "0" if there is no message before it, and ""
// if the log has forgotten it.
func (l *Log) before(c cursor) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	behindGap := false
	for pos := c.pos; pos > l.oldest; pos-- {
		switch e := l.at(pos - 1); {
		case e.id == "":
			behindGap = true
		case behindGap && e.announced():
			return e.id + "." + hadGapBehind
		case e.unsure:
			return e.id + "." + hadGapBefore
		default:
			return e.id
		}
	}
	if l.oldest > 0 {
		return ""
	}
	return "0"
}

// The frames of the events that are not messages. The empty data line makes a browser
// dispatch them, and without an id they leave its Last-Event-ID alone; pingAt has one.
var (
	gapFrame  = []byte("event: gap\ndata:\n\n")
	waitFrame = []byte("event: wait\ndata:\n\n")
	pingFrame = []byte("event: ping\ndata:\n\n")
)

// encode returns the frame of a message: a data line for each line of its text. A browser takes
// one space after the colon away (HTML, section 9.2.6), so the text's own first space is safe.
func encode(m message) []byte {
	b := make([]byte, 0, len(m.id)+len(m.line)+32)
	b = append(append(append(b, "id: "...), m.id...), '\n')
	for line := range strings.SplitSeq(m.line, "\n") {
		b = append(append(append(b, "data: "...), line...), '\n')
	}
	return append(b, '\n')
}

// pingAt returns the ping that tells a reader it is up to date as of the message id.
func pingAt(id string) []byte {
	if id == "" {
		return pingFrame
	}
	return fmt.Appendf(nil, "event: ping\nid: %s\ndata:\n\n", id)
}

// retryFrame tells the browser when to come back after the answer has ended: after low to high
// milliseconds, so that a class does not come back in one instant.
func retryFrame(low, high int) []byte {
	return fmt.Appendf(nil, "retry: %d\n\n", low+mathrand.IntN(high-low+1))
}

// validKey tells whether s can be an Idempotency-Key, and so the id of an announced message.
func validKey(s string) bool {
	return len(s) >= 16 && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_' || r == '-')
	})
}

// validID tells whether s can be an id of a message, so that it may be on its way from Redis.
func validID(s string) bool {
	base, hash, foreign := strings.Cut(s, ".")
	if !foreign {
		return validKey(s)
	}
	return (base == "0" || validKey(base)) && len(hash) == 8 && strings.Trim(hash, "abcdefghijklmnopqrstuvwxyz") == ""
}

// clean returns s as the room shows it: CRLF, CR and U+2028 are line breaks (LF), bytes that
// are not UTF-8 become U+FFFD, and control characters except tab and those that turn the
// writing direction are dropped. Of more than limit characters, cut is true and the rest gone.
func clean(s string, limit int) (text string, cut bool) {
	var b strings.Builder
	b.Grow(min(len(s), limit*utf8.UTFMax))
	n := 0
	for i, r := range s {
		switch {
		case r == '\r' && strings.HasPrefix(s[i+1:], "\n"):
			continue
		case r == '\r' || r == '\u2028':
			r = '\n'
		case r != '\n' && r != '\t' && unicode.In(r, unicode.Cc, unicode.Bidi_Control):
			continue
		}
		if n == limit {
			return b.String(), true
		}
		b.WriteRune(r)
		n++
	}
	return b.String(), false
}

// invisible tells whether a character alone shows nothing: white space, format characters, the
// default-ignorable ones of Unicode, and four whose picture is empty: a braille pattern, two
// hieroglyphs and a note head.
func invisible(r rune) bool {
	return unicode.IsSpace(r) || strings.ContainsRune("\u2800\U00013441\U00013442\U0001d159", r) ||
		unicode.In(r, unicode.Cc, unicode.Cf, unicode.Other_Default_Ignorable_Code_Point,
			unicode.Variation_Selector)
}

func blank(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return !invisible(r) })
}

// cleanName returns the name as the room shows it, or the key of the reason why it cannot be
// one. The brackets and the colon are the grammar of the line.
func cleanName(s string) (name, reason string) {
	name = strings.NewReplacer("\ufe0f", "", "\u200d", "").Replace(s)
	name = strings.Join(strings.Fields(name), " ")
	switch {
	case !utf8.ValidString(s):
		return "", "name_chars"
	case name == "":
		return "", "name_empty"
	case utf8.RuneCountInString(name) > maxName:
		return "", "name_long"
	}
	solid := false
	for _, r := range name {
		if strings.ContainsRune(":[]", r) || r != ' ' &&
			(invisible(r) || !unicode.In(r, unicode.L, unicode.M, unicode.N, unicode.P, unicode.S)) {
			return "", "name_chars"
		}
		solid = solid || unicode.In(r, unicode.L, unicode.N, unicode.S)
	}
	if !solid {
		return "", "name_chars"
	}
	return name, ""
}

// A signer makes and checks the values of session cookies.
type signer struct {
	key  []byte
	id   string    // names the key in a value, and tells nothing of it
	sure time.Time // until then an older key may turn out to be the room's
}

// newSigner derives the signing key, so that another password is another key and ends every
// session.
func newSigner(key, password string, sure time.Time) *signer {
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte("chat session v1" + password))
	k := &signer{key: mac.Sum(nil), sure: sure}
	k.id = k.mac("id")[:6]
	return k
}

// A session is what a cookie says: who, until when, and which login it was.
type session struct {
	id, name string
	expires  time.Time
}

// sign returns the cookie's value: version, key, expiry, id and name, and the MAC over these as
// they stand. The name is encoded because http.SetCookie drops what RFC 6265 forbids.
func (k *signer) sign(s session) string {
	name := base64.RawURLEncoding.EncodeToString([]byte(s.name))
	body := fmt.Sprintf("v1.%s.%d.%s.%s", k.id, s.expires.Unix(), s.id, name)
	return body + "." + k.mac(body)
}

func (k *signer) mac(body string) string {
	mac := hmac.New(sha256.New, k.key)
	mac.Write([]byte(body))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// verify returns the session of a cookie's value. The MAC is compared as text, before anything
// is decoded: base64 has several spellings of the same bytes.
func (k *signer) verify(value string, now time.Time) (s session, ok bool) {
	dot := strings.LastIndexByte(value, '.')
	if dot < 0 || !hmac.Equal([]byte(k.mac(value[:dot])), []byte(value[dot+1:])) {
		return s, false
	}
	part := strings.Split(value[:dot], ".")
	if len(part) != 5 || part[0] != "v1" {
		return s, false
	}
	expires, err := strconv.ParseInt(part[2], 10, 64)
	name, err2 := base64.RawURLEncoding.DecodeString(part[4])
	s = session{id: part[3], name: string(name), expires: time.Unix(expires, 0)}
	return s, err == nil && err2 == nil && now.Before(s.expires)
}

// otherKey tells whether a value names another key, which may yet turn out to be the room's.
func (k *signer) otherKey(value string, now time.Time) bool {
	return now.Before(k.sure) && !strings.HasPrefix(value, "v1."+k.id+".")
}

// cookieName is the name of the session cookie. Ports of a host share their cookies, so there
// may be several of it.
const cookieName = "chat_session"

// cookieValues returns the values of all session cookies of a request, as they stand. It reads
// the header itself because net/http leaves out a cookie with bytes that RFC 6265 forbids, and
// a broken session must not look like none.
func cookieValues(h http.Header) (values []string) {
	for _, line := range h["Cookie"] {
		for pair := range strings.SplitSeq(line, ";") {
			if name, value, _ := strings.Cut(strings.TrimSpace(pair), "="); name == cookieName {
				values = append(values, value)
			}
		}
	}
	return values
}

// A limiter gives each key burst tokens, and one more every so often. A key costs one time: the
// moment at which its tokens are all back.
type limiter struct {
	every time.Duration // 0: no limit
	burst int

	mu    sync.Mutex // guards full and sweep
	full  map[string]time.Time
	sweep int // above this size, keys whose moment has passed are taken out of full
}

// take takes a token, or returns how long until there is one.
func (l *limiter) take(key string, now time.Time) (wait time.Duration) {
	if l.every == 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.full == nil || len(l.full) > l.sweep {
		kept := map[string]time.Time{}
		for k, t := range l.full {
			if t.After(now) {
				kept[k] = t
			}
		}
		l.full, l.sweep = kept, 2*len(kept)+1000
	}
	full := l.full[key]
	if full.Before(now) {
		full = now
	}
	if wait = full.Sub(now) - time.Duration(l.burst-1)*l.every; wait > 0 {
		return wait
	}
	l.full[key] = full.Add(l.every)
	return 0
}

// giveBack returns a token that was not used.
func (l *limiter) giveBack(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if full, ok := l.full[key]; ok {
		l.full[key] = full.Add(-l.every)
	}
}

// A broker shares the log with other processes through Redis. It keeps two connections: one
// subscribes, one publishes. When anything on them is not as it should be, both are closed and
// the broker joins again, so there is one way back from every fault.
type broker struct {
	url     string
	channel string
	key     string // cookie key to share; "" until it is known
	ownKey  bool   // the key came from CHAT_KEY and stays out of Redis
	gotKey  func(key string, sure time.Time)
	log     *Log
	logf    func(format string, args ...any)

	posts chan *post
	start time.Time    // of the broker; heard counts from it, so that a changed clock is no matter
	heard atomic.Int64 // when the subscription last brought a line or our probe, in ns after start

	mu   sync.Mutex // guards away
	away error      // why the room is not joined; nil while it is

	// Foreign lines are numbered among equal ones since the announced line before them.
	// Used only by the goroutine that follows the subscription, and before it starts.
	base string // id of that line, "0" before the first
	seen map[[sha256.Size]byte]int
}

// A post is a message on its way to Redis.
type post struct {
	message
	done chan error // gets the outcome of EXEC; buffered, so that nobody waits to give it
}

var (
	errNotJoined = errors.New("not joined yet")
	errProbe     = errors.New("what is published does not come back")
	errForgot    = errors.New("the history or the key was forgotten or written anew")
)

func newBroker(cfg *config, l *Log, logf func(string, ...any), gotKey func(string, time.Time)) *broker {
	return &broker{url: cfg.redis.String(), channel: cfg.channel, key: cfg.key, ownKey: cfg.key != "",
		gotKey: gotKey, log: l, logf: logf, posts: make(chan *post), away: errNotJoined, base: "0", start: time.Now()}
}

// run keeps the room joined until ctx ends. It logs changes of state, not attempts.
//
// While Redis is away posts get 503, readers stay connected and hear pings, and nothing is
// appended. To join again is to agree on the key, subscribe, take the list into the log, write it
// back if it lacks something, and see that what is published comes back.
func (b *broker) run(ctx context.Context) {
	for pause := time.Duration(0); ; {
		start := time.Now()
		err := b.stay(ctx)
		if ctx.Err() != nil {
			return
		}
		b.leave(err)
		pause = nextPause(pause, time.Since(start))
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause/2 + mathrand.N(pause)):
		}
	}
}

// nextPause is how long to wait after a stay and the pause before it; after a long one, as if it
// were the first.
func nextPause(pause, stayed time.Duration) time.Duration {
	if stayed > 2*redisSilence {
		return minBackoff
	}
	return min(max(2*pause, minBackoff), maxBackoff)
}

// leave notes why the room is away, and says so once.
func (b *broker) leave(err error) {
	b.mu.Lock()
	was := b.away
	b.away = err
	b.mu.Unlock()
	if was == nil || was == errNotJoined {
		b.log.leave()
		hint := ""
		if op, ok := errors.AsType[*net.OpError](err); was == errNotJoined && ok && op.Op == "dial" {
			hint = "; start it, or leave -redis out for a room in memory"
		}
		b.logf("redis is away, trying again until it answers: %v%s", err, hint)
	}
}

// join notes that messages flow.
func (b *broker) join() {
	b.mu.Lock()
	was := b.away
	b.away = nil
	b.mu.Unlock()
	if was != nil {
		b.log.join()
		b.logf("redis is joined, %d messages held", b.log.size())
	}
}

// state returns why the room is away, nil while it is not.
func (b *broker) state() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.away
}

// publish puts the message into the room and returns when it has come back, or why that is not
// sure. It may come back later all the same; the id makes a second attempt harmless.
func (b *broker) publish(ctx context.Context, m message) error {
	if err := b.state(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	p := &post{m, make(chan error, 1)}
	select {
	case b.posts <- p:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-p.done:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		known, wake := b.log.has(m.id)
		if known {
			return nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// stay joins the room and stays until something breaks, and returns what did.
func (b *broker) stay(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // closes both connections
	pub, err := b.dial(ctx)
	if err != nil {
		return err
	}
	sub, err := b.dial(ctx)
	if err != nil {
		return err
	}
	if err := b.shareKey(pub); err != nil {
		return err
	}
	head, err := b.subscribe(sub)
	if err != nil {
		return err
	}
	probe, err := b.takeList(pub, head)
	if err != nil {
		return err
	}
	echo, broken := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		defer close(broken)
		broken <- b.follow(sub, probe, echo)
	}()
	err = b.serve(pub, probe, echo, broken)
	cancel()
	for range broken { // the next stay must be the only one to append
	}
	return err
}

// dial connects to Redis. The connection is closed when ctx ends, also while it logs in.
func (b *broker) dial(ctx context.Context) (redis.Conn, error) {
	netDial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{Timeout: redisTimeout}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		context.AfterFunc(ctx, func() { c.Close() })
		return timelyConn{c}, nil
	}
	c, err := redis.DialURLContext(ctx, b.url, redis.DialContextFunc(netDial),
		redis.DialReadTimeout(redisTimeout), redis.DialTLSHandshakeTimeout(redisTimeout))
	if why, _, echo := strings.Cut(fmt.Sprint(err), ", with args"); echo {
		err = errors.New(why) // a server that does not know AUTH repeats the password
	}
	return c, err
}

// A timelyConn gives each write redisTimeout. Redigo's own option sets the deadline anew for each
// command of a batch, and setting one is dear.
type timelyConn struct{ net.Conn }

func (c timelyConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(redisTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// shareKey agrees with the other processes on the key of the cookies: the first one draws it,
// and whoever holds it puts it back, in case Redis forgot. A key begins with the time at which
// it was drawn: of two, one of which was drawn while Redis had forgotten the other, the older
// is the room's, and the other processes are made to join again. A key that was just drawn may
// lose to an older one for keyGrace: a holder looks at the key every redisSilence, and has
// redisTimeout to put its own back.
func (b *broker) shareKey(c redis.Conn) error {
	if b.ownKey {
		return nil
	}
	name := b.channel + ":key"
	drawn := fmt.Sprintf("%016x-%s", time.Now().UnixNano(), rand.Text())
	if _, err := c.Do("SET", name, cmp.Or(b.key, drawn), "NX"); err != nil {
		return err
	}
	found, err := redis.String(c.Do("GET", name))
	switch {
	case err != nil:
		return err
	case found == "":
		return fmt.Errorf("%s is empty", name)
	case b.key == "" || found < b.key:
		b.key = found
		sure := time.Now()
		if found == drawn { // by us, and perhaps before one who knows an older one put that back
			sure = sure.Add(keyGrace)
		}
		b.gotKey(found, sure)
	case found != b.key:
		c.Send("SET", name, b.key)
		_, err = c.Do("PUBLISH", b.channel+":probe", rewritten)
	}
	return err
}

// subscribe starts the subscription and returns the id of the list's newest message as it was
// at that moment: "" if the list was empty, and a word that no message has for an id if its newest
// item is not ours. The list itself is read on the other connection: Redis ends a subscriber to
// whom it owes over 32 MB, or over 8 MB for a minute, and a list can be 64 MB. What was published
// in between comes twice, and the second copy is dropped.
func (b *broker) subscribe(c redis.Conn) (head string, err error) {
	c.Send("MULTI")
	for _, suffix := range []string{"", ":id", ":probe"} {
		c.Send("SUBSCRIBE", b.channel+suffix)
	}
	c.Send("LRANGE", b.channel+":history", -1, -1)
	replies, err := results(c.Do("EXEC"))
	if err != nil {
		return "", err
	}
	newest, err := redis.Strings(replies[len(replies)-1], nil)
	if len(newest) > 0 {
		id, _, _ := strings.Cut(newest[0], " ")
		head = cmp.Or(id, "?")
	}
	return head, err
}

// results returns the replies inside an EXEC, at least one. An error among them counts as the
// whole's: Redis runs the other commands all the same.
func results(reply any, err error) ([]any, error) {
	replies, err := redis.Values(reply, err)
	for _, r := range replies {
		if e, bad := r.(redis.Error); bad {
			return nil, e
		}
	}
	if err == nil && len(replies) == 0 {
		err = errors.New("a transaction was answered with nothing")
	}
	return replies, err
}

// parseList reads the list's items. What is not "<id> <line>" is not ours and is left out.
func parseList(reply any) ([]message, error) {
	items, err := redis.ByteSlices(reply, nil)
	list := make([]message, 0, len(items))
	for _, item := range items {
		id, raw, _ := strings.Cut(string(item), " ")
		if line := fromRedis(raw); validKey(id) && !blank(line) {
			list = append(list, message{strings.Clone(id), line}) // else it keeps the whole item
		}
	}
	return list, err
}

// toRedis and fromRedis turn a line into one without line breaks and back. Other programs write
// here too, so what comes back is cleaned and, when it is too long, cut.
func toRedis(line string) string { return strings.ReplaceAll(line, "\n", "\u2028") }

func fromRedis(raw string) string {
	line, cut := clean(raw, maxLine)
	if cut {
		_, last := utf8.DecodeLastRuneInString(line)
		line = line[:len(line)-last] + "…"
	}
	return line
}

// takeList takes the list into the log, up to head: what stands behind that comes by the
// subscription too, in its place among the foreign lines. When the list lacks some of the log,
// Redis has forgotten, and the log is written back. It returns the probe that was published
// at the moment of the list that was taken or written.
func (b *broker) takeList(c redis.Conn, head string) (probe string, err error) {
	for range restoreTries {
		probe = rand.Text()
		c.Send("MULTI")
		c.Send("LRANGE", b.channel+":history", 0, -1)
		b.queueProbe(c, probe)
		replies, err := results(redis.DoWithTimeout(c, listTimeout, "EXEC"))
		if err != nil {
			return "", err
		}
		list, err := parseList(replies[0])
		if err != nil {
			return "", err
		}
		upTo := seam(list, head)
		complete := b.log.merge(list, upTo)
		if upTo > 0 {
			b.heardOf(list[upTo-1].id)
		}
		if complete {
			return probe, nil
		}
		probe = rand.Text() // what went before it is older than the list now
		if err = b.writeList(c, probe); err != redis.ErrNil {
			return probe, err
		}
	}
	return "", errors.New("the history is being rewritten by others")
}

// writeList writes the log as the list, between what is older than the log and what others have
// added, and makes the other processes join again, for some of it may be new to them. It returns
// redis.ErrNil when another process was faster: then WATCH made EXEC do nothing, or there was
// nothing left to do.
func (b *broker) writeList(c redis.Conn, probe string) error {
	name := b.channel + ":history"
	if _, err := c.Do("WATCH", name); err != nil {
		return err
	}
	reply, err := redis.DoWithTimeout(c, listTimeout, "LRANGE", name, 0, -1)
	if err != nil {
		return err
	}
	list, err := parseList(reply)
	if err != nil {
		return err
	}
	if b.log.merge(list, len(list)) {
		_, err = c.Do("UNWATCH")
		return cmp.Or(err, redis.ErrNil)
	}
	// So many stand before the first message that the log knows: they are older than the log.
	older := slices.IndexFunc(list, func(m message) bool { known, _ := b.log.has(m.id); return known })
	list = append(list[:max(older, 0)], b.log.posted()...)
	c.Send("MULTI")
	c.Send("DEL", name)
	for _, m := range list[max(len(list)-ringSize, 0):] {
		c.Send("RPUSH", name, m.id+" "+toRedis(m.line))
	}
	c.Send("PUBLISH", b.channel+":probe", rewritten+probe)
	_, err = results(redis.DoWithTimeout(c, listTimeout, "EXEC"))
	return err
}

// rewritten, on the probe channel before the probe of the process that did it, says that the
// list or the key was written back.
const rewritten = "rewritten "

// seam returns how many messages the list had when head was its newest.
func seam(list []message, head string) int {
	if head == "" {
		return 0
	}
	for i, m := range slices.Backward(list) {
		if m.id == head {
			return i + 1
		}
	}
	return len(list) // head was pushed out since, or is not ours
}

// follow appends what the subscription brings, and returns when it breaks. Redis lets nothing come
// between the commands of one EXEC, so the id before a line is the line's.
func (b *broker) follow(sub redis.Conn, probe string, echo chan<- struct{}) error {
	id := ""          // announces the next line
	caughtUp := false // with the list that was taken: our own probe has come
	for {
		switch m := (redis.PubSubConn{Conn: sub}).ReceiveWithTimeout(0).(type) {
		case error:
			return m
		case redis.Message:
			switch m.Channel {
			case b.channel + ":probe":
				sender, wroteBack := strings.CutPrefix(string(m.Data), rewritten)
				if wroteBack && sender != probe && caughtUp {
					return errForgot
				}
				if sender == probe {
					caughtUp = true
					select {
					case echo <- struct{}{}:
					default: // the one before is not taken yet
					}
				}
				continue
			case b.channel + ":id":
				if validKey(string(m.Data)) {
					id = string(m.Data)
				}
			case b.channel:
				b.receive(id, string(m.Data))
				id = ""
			}
			b.heard.Store(int64(time.Since(b.start)))
		}
	}
}

// receive appends a line from Redis, under the id that announced it or one derived from it.
func (b *broker) receive(id, raw string) {
	line := fromRedis(raw)
	switch {
	case blank(line):
	case id == "":
		b.log.append(message{b.foreignID(raw), line})
	default:
		b.log.append(message{id, line})
		b.heardOf(id)
	}
}

// heardOf notes that the channel has come to an announced message. A copy of an earlier one
// changes nothing.
func (b *broker) heardOf(id string) {
	if b.log.later(id, b.base) {
		b.base, b.seen = id, nil
	}
}

// foreignID returns the id of a line that no id announced: the announced one before it, a dot,
// and a hash of the line and of its number among equal lines since. Every process that heard
// the same derives the same.
func (b *broker) foreignID(raw string) string {
	if b.seen == nil || len(b.seen) == ringSize {
		b.seen = map[[sha256.Size]byte]int{}
	}
	sum := sha256.Sum256([]byte(raw))
	for {
		b.seen[sum]++
		hash := sha256.Sum256(fmt.Appendf(sum[:], " %d", b.seen[sum]))
		for i := range hash {
			hash[i] = 'a' + hash[i]%26
		}
		id := b.base + "." + string(hash[:8])
		if known, _ := b.log.has(id); !known {
			return id
		}
	}
}

// serve publishes posts, looks after the key, and probes when nothing was heard for a while, until
// something breaks. The first probe to come back makes the room joined.
func (b *broker) serve(pub redis.Conn, probe string, echo <-chan struct{}, broken <-chan error) error {
	tick := time.NewTimer(probeTimeout)
	defer tick.Stop()
	probing := true // the first probe went out with the list
	for {
		select {
		case err := <-broken:
			return err
		case p := <-b.posts:
			if err := b.send(pub, b.batch(p)); err != nil {
				return err
			}
		case <-echo:
			probing = false
			b.heard.Store(int64(time.Since(b.start)))
			b.join()
			tick.Reset(redisSilence)
		case <-tick.C:
			if probing && len(echo) == 0 {
				return errProbe
			}
			if probing {
				continue // the probe is back, and is taken next
			}
			if err := b.checkKey(pub); err != nil {
				return err
			}
			silence := time.Since(b.start) - time.Duration(b.heard.Load())
			if silence < redisSilence {
				tick.Reset(redisSilence - silence)
				continue
			}
			if err := b.sendProbe(pub, probe); err != nil {
				return err
			}
			probing = true
			tick.Reset(probeTimeout)
		}
	}
}

// checkKey sees that the key in Redis is still the room's: forgotten, or drawn anew meanwhile, it
// would divide the sessions.
func (b *broker) checkKey(c redis.Conn) error {
	if b.ownKey {
		return nil
	}
	key, err := redis.String(c.Do("GET", b.channel+":key"))
	if key != b.key && (err == nil || err == redis.ErrNil) {
		return errForgot
	}
	return err
}

// sendProbe publishes to the probe channel. It also looks how long the list is, which shows that
// Redis forgot it, and writes to it, which shows a read-only replica or a key of another type.
func (b *broker) sendProbe(c redis.Conn, probe string) error {
	held := b.log.size()
	c.Send("MULTI")
	c.Send("LLEN", b.channel+":history")
	b.queueProbe(c, probe)
	replies, err := results(c.Do("EXEC"))
	if err != nil {
		return err
	}
	if length, _ := replies[0].(int64); length < int64(held) {
		return errForgot
	}
	return nil
}

func (b *broker) queueProbe(c redis.Conn, probe string) {
	c.Send("LTRIM", b.channel+":history", -ringSize, -1)
	c.Send("PUBLISH", b.channel+":probe", probe)
}

// batch returns the post and others that already wait.
func (b *broker) batch(p *post) []*post {
	batch := []*post{p}
	for len(batch) < batchSize {
		select {
		case p = <-b.posts:
			batch = append(batch, p)
		default:
			return batch
		}
	}
	return batch
}

// send publishes a batch in one round trip, each post a transaction of its own, and tells each
// how it went. On an error the stay is over.
func (b *broker) send(c redis.Conn, batch []*post) (err error) {
	defer func() {
		for _, p := range batch {
			p.done <- err
		}
	}()
	held := b.log.size()
	list := b.channel + ":history"
	for _, p := range batch {
		line := toRedis(p.line)
		c.Send("MULTI")
		c.Send("RPUSH", list, p.id+" "+line)
		c.Send("LTRIM", list, -ringSize, -1)
		c.Send("PUBLISH", b.channel+":id", p.id)
		c.Send("PUBLISH", b.channel, line)
		c.Send("EXEC")
	}
	if err = c.Flush(); err != nil {
		return err
	}
	forgot := false
	for len(batch) > 0 {
		replies, err := receiveExec(c)
		if err != nil {
			return err
		}
		if length, _ := replies[0].(int64); length <= int64(held) {
			forgot = true
		}
		batch[0].done <- nil
		batch = batch[1:]
	}
	if forgot {
		return errForgot
	}
	return nil
}

// receiveExec receives the replies to MULTI, four queued commands and EXEC. Each has redisTimeout,
// so that a long way to Redis, which takes its time for a whole batch, is none that broke.
func receiveExec(c redis.Conn) ([]any, error) {
	var first error
	for range 5 {
		if _, err := c.Receive(); err != nil && first == nil {
			first = err
		}
		if c.Err() != nil {
			return nil, first
		}
	}
	replies, err := results(c.Receive())
	if first != nil {
		err = first // says more than that the transaction was discarded
	}
	return replies, err
}

// A server is the room as HTTP shows it.
type server struct {
	cfg    *config
	logf   func(format string, args ...any)
	log    *Log
	broker *broker                // nil: the room is in memory
	signer atomic.Pointer[signer] // nil while the key is not known
	urls   []string               // where the room can be opened

	pages   *template.Template
	texts   map[string]map[string]string // language → key → text
	files   map[string]file              // by name, what /assets/ serves
	mux     *http.ServeMux
	process string // which process this is, for the lesson

	posts, logins, guesses limiter // by session or address, by address, by address

	maxConns, maxStreams int
	conns                atomic.Int64 // open connections, streams among them
	toldFull             atomic.Int64 // when the log last said that they are too many, in Unix ns

	mu       sync.Mutex // guards streams, and the conn of each until it runs
	streams  map[*stream]struct{}
	finished sync.WaitGroup // the goroutines of streams
}

// fileLimit returns how many descriptors the process may open. Linux tells; elsewhere Go has
// already raised the limit to more than the answer here.
func fileLimit() int {
	limits, _ := os.ReadFile("/proc/self/limits")
	for line := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(line, "Max open files"); ok {
			if n, err := strconv.Atoi(strings.Fields(rest)[0]); err == nil {
				return n
			}
		}
	}
	return 8192
}

func newServer(cfg *config, logf func(string, ...any)) (*server, error) {
	s := &server{cfg: cfg, logf: logf, streams: map[*stream]struct{}{}}
	s.maxConns, s.maxStreams = capacity(fileLimit())
	if cfg.rate > 0 {
		s.posts = limiter{every: time.Duration(float64(time.Second) / cfg.rate), burst: postBurst}
		s.logins = limiter{every: time.Second / loginRate, burst: loginBurst}
		s.guesses = limiter{every: time.Second / guessRate, burst: guessBurst}
	}
	setKey := func(key string, sure time.Time) { s.signer.Store(newSigner(key, cfg.password, sure)) }
	if cfg.redis != nil {
		s.log = newLog(cfg.history, unknownGrace)
		s.broker = newBroker(cfg, s.log, logf, setKey)
	} else {
		s.log = newLog(cfg.history, 0)
		s.log.join()
	}
	if cfg.key != "" || cfg.redis == nil {
		setKey(cmp.Or(cfg.key, rand.Text()), time.Now())
	}
	s.mux = s.routes()
	host, _ := os.Hostname()
	s.process = fmt.Sprintf("%s, process %d", cmp.Or(host, "this machine"), os.Getpid())
	return s, s.loadAssets()
}

// capacity returns how many connections the process serves with so many descriptors, and how
// many of them may be streams: the others can still post.
func capacity(files int) (conns, streams int) {
	conns = max(files-spareFiles-busyConns, busyConns)
	return conns, conns - conns/8
}

// A file is one of the assets, named by its content for the browser's cache.
type file struct {
	kind, etag string
	content    []byte
}

// loadAssets parses the embedded pages and texts, and reads the files.
func (s *server) loadAssets() (err error) {
	// The types are named here because on Windows the system's may be anything.
	kinds := map[string]string{".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
		".svg": "image/svg+xml"}
	s.pages, err = template.New("").Option("missingkey=error").ParseFS(assets, "assets/*.html")
	if err != nil {
		return err
	}
	texts, err := assets.ReadFile("assets/strings.json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(texts, &s.texts); err != nil {
		return fmt.Errorf("reading strings.json: %w", err)
	}
	names, err := fs.Glob(assets, "assets/*")
	if err != nil {
		return err
	}
	s.files = map[string]file{}
	for _, name := range names {
		content, err := assets.ReadFile(name)
		if err != nil {
			return err
		}
		if kind, ok := kinds[path.Ext(name)]; ok {
			s.files[path.Base(name)] = file{kind, fmt.Sprintf(`"%.8x"`, sha256.Sum256(content)), content}
		}
	}
	return nil
}

// httpServer returns the server with its bounds: each of a request's parts takes bounded time
// and room. Streams leave these bounds when they take over their connection.
func (s *server) httpServer(ctx context.Context) *http.Server {
	return &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader - 4<<10, // net/http allows 4 KiB more than it is told
		ErrorLog:          log.New(onlyPanics(s.logf), "", 0),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       s.opened,
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				s.conns.Add(-1)
			}
		},
	}
}

// onlyPanics passes on what net/http says of a panic, and nothing that a client can cause at
// will.
type onlyPanics func(format string, args ...any)

func (logf onlyPanics) Write(line []byte) (int, error) {
	if bytes.Contains(line, []byte("panic")) {
		logf("%s", line)
	}
	return len(line), nil
}

// busy marks the context of a connection beyond maxConns.
type busy struct{}

// opened counts a connection and bounds what the kernel keeps for it. Beyond maxConns a few
// are still heard, to be told 503; beyond these the connection is closed.
func (s *server) opened(ctx context.Context, c net.Conn) context.Context {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sendBuffer)
	}
	n := int(s.conns.Add(1))
	if n > s.maxConns+busyConns {
		c.Close()
	}
	if n > s.maxConns {
		s.full()
		return context.WithValue(ctx, busy{}, true)
	}
	return ctx
}

// full logs, at most once in a while, that not everybody finds room.
func (s *server) full() {
	last, now := s.toldFull.Load(), time.Now().UnixNano()
	if now-last > int64(fullPause) && s.toldFull.CompareAndSwap(last, now) {
		s.logf("full: %d of %d connections are open, %d of them may be streams; "+
			"a higher limit of open files (ulimit -n) makes room for more", s.conns.Load(), s.maxConns, s.maxStreams)
	}
}

// shutdown ends everything within stopTimeout. Posts that wait have been told by their context;
// streams tell their reader when to come back.
func (s *server) shutdown(srv *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	s.log.close()
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for st := range s.streams {
			if st.conn != nil {
				st.conn.Close()
			}
		}
	})
	srv.Shutdown(ctx)
	srv.Close()
	s.finished.Wait()
}

// routes says who answers what. The patterns give 404, and 405 with Allow, by themselves.
func (s *server) routes() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.chat)
	mux.HandleFunc("GET /login", s.loginForm)
	mux.HandleFunc("POST /login", s.sameOrigin(s.login))
	mux.HandleFunc("POST /logout", s.sameOrigin(s.logout))
	mux.HandleFunc("POST /post", s.sameOrigin(s.post))
	mux.HandleFunc("GET /stream", s.stream)
	mux.HandleFunc("GET /lesson", s.lesson)
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /assets/{name}", s.asset)
	return mux
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Context().Value(busy{}) != nil {
		w.Header().Set("Connection", "close")
		unavailable(w, "too many connections")
		return
	}
	s.mux.ServeHTTP(w, r)
}

// protect bounds what a page, or a worker's script, may load and tell others. Other answers go
// without: the 204 of a post would hold little else.
func protect(h http.Header) {
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "+
		"connect-src 'self'; worker-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "+
		"require-trusted-types-for 'script'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "same-origin") // with no-referrer a form's Origin would be null
}

// unavailable answers 503, with a time to come back at which not everybody does.
func unavailable(w http.ResponseWriter, why string) {
	w.Header().Set("Retry-After", strconv.Itoa(1+mathrand.IntN(3)))
	http.Error(w, why, http.StatusServiceUnavailable)
}

// setRetryAfter says after how many whole seconds to come back.
func setRetryAfter(w http.ResponseWriter, wait time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
}

// sameOrigin refuses a request that another site's page made the browser send.
func (s *server) sameOrigin(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if s.cfg.origins.Check(r) != nil {
			http.Error(w, "this request came from a page of another site; "+
				"if a proxy changes the Host header, start chat with -origin and the address that people open",
				http.StatusForbidden)
			return
		}
		next(w, r)
	}
}

// An identity is what a request's cookies say of its sender.
type identity int

const (
	nobody  identity = iota // no cookie of ours
	member                  // one of them verifies
	invalid                 // none of them does
	pending                 // the key to tell is not known yet
)

// identify checks the session cookies. Any that verifies is good: several rooms on the ports
// of one host share their cookies.
func (s *server) identify(r *http.Request) (session, identity) {
	values := cookieValues(r.Header)
	if len(values) == 0 {
		return session{}, nobody
	}
	k := s.signer.Load()
	if k == nil {
		return session{}, pending
	}
	now, who := time.Now(), invalid
	for _, v := range values {
		if sess, ok := k.verify(v, now); ok {
			return sess, member
		}
		if k.otherKey(v, now) {
			who = pending
		}
	}
	return session{}, who
}

const cannotTell = "the room cannot tell who you are until Redis is back"

// admit tells whether the sender may take part in the room, and answers if not. To read an open
// room takes no session; but who comes with a broken one must not become anonymous to write.
func (s *server) admit(w http.ResponseWriter, r *http.Request, write bool) (session, bool) {
	sess, who := s.identify(r)
	closed := s.cfg.password != ""
	switch {
	case who == pending && (closed || write):
		unavailable(w, cannotTell)
	case who != member && closed, who == invalid && write:
		http.Error(w, "log in first", http.StatusUnauthorized)
	default:
		return sess, true
	}
	return sess, false
}

// address names where a request comes from: the peer or, behind a proxy on this machine, the last
// address that the proxy names. Of IPv6 it is the /64, which is one subscriber's.
func address(r *http.Request) string {
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	ip, _ := netip.ParseAddr(host)
	if via := r.Header.Values("X-Forwarded-For"); ip.IsLoopback() && len(via) > 0 {
		last := via[len(via)-1]
		if client, err := netip.ParseAddr(strings.TrimSpace(last[strings.LastIndexByte(last, ',')+1:])); err == nil {
			ip = client
		}
	}
	ip = ip.Unmap()
	if ip.Is6() {
		prefix, _ := ip.WithZone("").Prefix(64)
		ip = prefix.Addr()
	}
	return ip.String()
}

// readForm reads a form from the body, or answers why it cannot. It splits at & alone, as the
// URL standard does: net/http also refuses a bare semicolon, which curl -d sends.
func readForm(w http.ResponseWriter, r *http.Request) (url.Values, bool) {
	const formType = "application/x-www-form-urlencoded"
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != formType {
		http.Error(w, "want a form: Content-Type "+formType, http.StatusUnsupportedMediaType)
		return nil, false
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooBig := errors.AsType[*http.MaxBytesError](err); tooBig {
		http.Error(w, fmt.Sprintf("the form is over %d bytes", maxBody), http.StatusRequestEntityTooLarge)
		return nil, false
	}
	form, bad := parseForm(string(body))
	if err != nil || bad != nil {
		http.Error(w, "the form is broken", http.StatusBadRequest)
		return nil, false
	}
	return form, true
}

func parseForm(body string) (url.Values, error) {
	form := url.Values{}
	for pair := range strings.SplitSeq(body, "&") {
		key, value, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(key)
		value, err2 := url.QueryUnescape(value)
		if err != nil || err2 != nil {
			return nil, cmp.Or(err, err2)
		}
		form.Add(key, value)
	}
	return form, nil
}

// A view is what the pages are made from.
type view struct {
	Lang     string
	T        map[string]string // the texts of that language
	Name     string            // of the session, or to fill in
	Error    string            // login: key of the text that says what was wrong
	Password bool              // login: the room has one
	View     string            // chat: "projector"
	Join     string            // chat, lesson: the address to open in the room
	Redis    bool              // lesson: the room is shared
	Channel  string            // lesson: through this channel
	Process  string            // lesson: which process made the page
}

// show writes a page. Pages are about one person, so nothing keeps them.
func (s *server) show(w http.ResponseWriter, r *http.Request, status int, page string, v view) {
	v.Lang = language(r.Header.Get("Accept-Language"))
	v.T = s.texts[v.Lang]
	var b bytes.Buffer
	if err := s.pages.ExecuteTemplate(&b, page, v); err != nil {
		s.logf("making %s: %v", page, err)
		http.Error(w, "this page is broken", http.StatusInternalServerError)
		return
	}
	protect(w.Header())
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Language", v.Lang)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(b.Bytes())
}

// language returns which of zh and en the header prefers (RFC 9110, section 12.5.4), else en.
func language(accept string) string {
	best, bestQ := "en", 0.0
	for item := range strings.SplitSeq(accept, ",") {
		tag, params, _ := strings.Cut(item, ";")
		tag, _, _ = strings.Cut(strings.ToLower(strings.TrimSpace(tag)), "-")
		q := 1.0
		if text, ok := strings.CutPrefix(strings.TrimSpace(params), "q="); ok {
			q, _ = strconv.ParseFloat(text, 64)
		}
		if (tag == "en" || tag == "zh") && q > bestQ {
			best, bestQ = tag, q
		}
	}
	return best
}

func (s *server) chat(w http.ResponseWriter, r *http.Request) {
	sess, who := s.identify(r)
	if who != member {
		turnAway(w, r, who)
		return
	}
	v := view{Name: sess.name, Join: s.joinURL(r)}
	if r.URL.Query().Get("view") == "projector" {
		v.View = "projector"
	}
	s.show(w, r, http.StatusOK, "chat.html", v)
}

// turnAway answers who asks for a page that only members get.
func turnAway(w http.ResponseWriter, r *http.Request, who identity) {
	if who == pending {
		unavailable(w, cannotTell)
		return
	}
	rememberPage(w, r)
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

// nextName is the name of the cookie with the page that sent somebody to the login. The pages'
// script sets it too.
const nextName = "chat_next"

// nextPages are the pages that lead back to themselves.
var nextPages = []string{"/lesson", "/?view=projector"}

func rememberPage(w http.ResponseWriter, r *http.Request) {
	if page := r.URL.RequestURI(); slices.Contains(nextPages, page) {
		http.SetCookie(w, &http.Cookie{Name: nextName, Value: url.QueryEscape(page), Path: "/", MaxAge: 600, SameSite: http.SameSiteLaxMode})
	}
}

// nextPage is where a login leads, once.
func nextPage(w http.ResponseWriter, r *http.Request) string {
	c, err := r.Cookie(nextName)
	if err != nil {
		return "/"
	}
	http.SetCookie(w, &http.Cookie{Name: nextName, Path: "/", MaxAge: -1})
	if page, _ := url.QueryUnescape(c.Value); slices.Contains(nextPages, page) {
		return page
	}
	return "/"
}

// roomURLs lists the addresses at which the room can be opened, the likeliest first.
func roomURLs(addr net.Addr) []string {
	tcp := addr.(*net.TCPAddr)
	hosts := []string{tcp.IP.String()}
	if tcp.IP.IsUnspecified() {
		out := ""
		// Connecting a UDP socket sends nothing; it asks the kernel for a route.
		if c, err := net.Dial("udp4", "192.0.2.1:9"); err == nil {
			out, _, _ = net.SplitHostPort(c.LocalAddr().String())
			c.Close()
		}
		hosts = append([]string{"localhost"}, likeliest(ownAddresses(), out, tcp.IP.To4() == nil)...)
	}
	for i, host := range hosts {
		hosts[i] = "http://" + net.JoinHostPort(host, strconv.Itoa(tcp.Port))
	}
	return hosts
}

// An ownAddress is an address of this machine.
type ownAddress struct {
	ip     netip.Addr
	shared bool // with neighbours: its link is no tunnel
	bridge bool // its link joins others, often virtual machines that only this one sees
}

// ownAddresses lists the addresses of the links that are up and have a cable or its like.
func ownAddresses() (own []ownAddress) {
	links, _ := net.Interfaces()
	for _, link := range links {
		addrs, _ := link.Addrs()
		_, err := os.Stat("/sys/class/net/" + link.Name + "/bridge")
		bridge := err == nil
		for _, a := range addrs {
			prefix, err := netip.ParsePrefix(a.String())
			if err == nil && link.Flags&net.FlagRunning != 0 && !prefix.Addr().IsLoopback() {
				own = append(own, ownAddress{prefix.Addr(), link.Flags&net.FlagBroadcast != 0, bridge})
			}
		}
	}
	return own
}

// likeliest orders the addresses by how likely a neighbour reaches them: out, which has the way
// to the rest of the world, then other networks, then bridges and tunnels. Only where there is
// none of these: what machines give themselves on a switch without DHCP, and then IPv6, which
// nobody likes to type, if the room is open there.
func likeliest(own []ownAddress, out string, v6 bool) []string {
	var ranks [5][]string
	for _, a := range own {
		rank := 2
		switch ip := a.ip.String(); {
		case a.ip.Is6() && !a.ip.IsGlobalUnicast():
			continue
		case a.ip.Is6():
			rank = 4
		case !a.ip.IsGlobalUnicast():
			rank = 3
		case a.shared && ip == out:
			rank = 0
		case a.shared && !a.bridge:
			rank = 1
		}
		ranks[rank] = append(ranks[rank], a.ip.String())
	}
	hosts := slices.Concat(ranks[:3]...)
	switch {
	case len(hosts) == 0 && out != "": // Android does not list its links
		return []string{out}
	case len(hosts) == 0 && len(ranks[3]) > 0:
		return ranks[3]
	case len(hosts) == 0 && v6:
		return ranks[4]
	}
	return hosts
}

// joinURL is the address that others open: the one this page was opened at, unless only this
// machine can.
func (s *server) joinURL(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = r.Host
	}
	ip, _ := netip.ParseAddr(host)
	if (host == "localhost" || ip.IsLoopback()) && len(s.urls) > 1 {
		return s.urls[1]
	}
	if secure(r) {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

// secure tells whether the browser's side of the connection is TLS, which a proxy ends.
func secure(r *http.Request) bool {
	return strings.EqualFold(r.Header.Get("X-Forwarded-Proto"), "https")
}

func (s *server) loginForm(w http.ResponseWriter, r *http.Request) {
	sess, who := s.identify(r)
	reason := ""
	if who == invalid {
		sess.name, reason = claimedName(r.Header), "session_over"
	}
	s.showLogin(w, r, http.StatusOK, sess.name, reason)
}

// claimedName is the name in a cookie that does not verify: good enough to fill in a form.
func claimedName(h http.Header) string {
	for _, value := range cookieValues(h) {
		part := strings.Split(value, ".")
		if len(part) != 6 {
			continue
		}
		if name, err := base64.RawURLEncoding.DecodeString(part[4]); err == nil {
			if clean, reason := cleanName(string(name)); reason == "" {
				return clean
			}
		}
	}
	return ""
}

func (s *server) showLogin(w http.ResponseWriter, r *http.Request, status int, name, reason string) {
	s.show(w, r, status, "login.html", view{Name: name, Error: reason, Password: s.cfg.password != ""})
}

func (s *server) login(w http.ResponseWriter, r *http.Request) {
	form, ok := readForm(w, r)
	if !ok {
		return
	}
	typed := strings.ToValidUTF8(form.Get("user"), "\ufffd")
	name, reason := cleanName(form.Get("user"))
	if reason != "" {
		s.showLogin(w, r, http.StatusUnprocessableEntity, typed, reason)
		return
	}
	k, now, from := s.signer.Load(), time.Now(), address(r)
	if k == nil {
		unavailable(w, "nobody can log in until Redis is back")
		return
	}
	if s.cfg.password != "" {
		if wait := s.guesses.take(from, now); wait > 0 {
			setRetryAfter(w, wait)
			s.showLogin(w, r, http.StatusTooManyRequests, typed, "too_many")
			return
		}
		if !hmac.Equal([]byte(form.Get("password")), []byte(s.cfg.password)) {
			s.showLogin(w, r, http.StatusForbidden, typed, "password_wrong")
			return
		}
		s.guesses.giveBack(from)
	}
	if wait := s.logins.take(from, now); wait > 0 {
		setRetryAfter(w, wait)
		s.showLogin(w, r, http.StatusTooManyRequests, typed, "too_many")
		return
	}
	value := k.sign(session{id: rand.Text(), name: name, expires: now.Add(sessionLife)})
	setCookie(w, r, value, int(sessionLife.Seconds()))
	http.Redirect(w, r, nextPage(w, r), http.StatusSeeOther)
}

func setCookie(w http.ResponseWriter, r *http.Request, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{Name: cookieName, Value: value, Path: "/", MaxAge: maxAge,
		HttpOnly: true, Secure: secure(r), SameSite: http.SameSiteLaxMode})
}

func (s *server) logout(w http.ResponseWriter, r *http.Request) {
	setCookie(w, r, "", -1)
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

// post puts a message into the room. The order of the checks is part of the contract.
func (s *server) post(w http.ResponseWriter, r *http.Request) {
	sess, ok := s.admit(w, r, true)
	if !ok {
		return
	}
	form, ok := readForm(w, r)
	if !ok {
		return
	}
	id := rand.Text()
	if keys, ok := r.Header["Idempotency-Key"]; ok {
		if id = keys[0]; !validKey(id) {
			http.Error(w, "Idempotency-Key wants 16 to 64 of A-Z a-z 0-9 _ -", http.StatusBadRequest)
			return
		}
	}
	text := form.Get("message")
	if !utf8.ValidString(text) || blank(text) {
		http.Error(w, "message is missing, blank or not UTF-8", http.StatusUnprocessableEntity)
		return
	}
	text, cut := clean(text, maxMessage)
	if cut {
		http.Error(w, fmt.Sprintf("message is over %d characters", maxMessage), http.StatusRequestEntityTooLarge)
		return
	}
	if known, _ := s.log.has(id); !known && !s.accept(w, r, sess, id, text) {
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// accept puts a new message into the room within the sender's rate, or answers why not. What
// could not be confirmed costs the sender nothing.
func (s *server) accept(w http.ResponseWriter, r *http.Request, sess session, id, text string) bool {
	now, sender, name := time.Now(), sess.id, sess.name
	if name == "" {
		sender, name = "from "+address(r), "anonymous"
	}
	if wait := s.posts.take(sender, now); wait > 0 {
		setRetryAfter(w, wait)
		http.Error(w, "too fast", http.StatusTooManyRequests)
		return false
	}
	m := message{id, now.Format("[15:04:05] ") + name + ": " + text}
	if s.broker == nil {
		s.log.append(m)
	} else if err := s.broker.publish(r.Context(), m); err != nil {
		if r.Context().Err() == nil { // who hung up may well have posted
			s.posts.giveBack(sender)
		}
		unavailable(w, "not sure that the message is in the room; with its Idempotency-Key it is safe to send it again")
		return false
	}
	return true
}

func (s *server) lesson(w http.ResponseWriter, r *http.Request) {
	if _, who := s.identify(r); who != member && s.cfg.password != "" {
		turnAway(w, r, who)
		return
	}
	s.show(w, r, http.StatusOK, "lesson.html",
		view{Redis: s.broker != nil, Channel: s.cfg.channel, Process: s.process, Join: s.joinURL(r)})
}

func (s *server) healthz(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if s.broker != nil {
		if err := s.broker.state(); err != nil {
			unavailable(w, fmt.Sprintf("redis is away: %v", err))
			return
		}
	}
	fmt.Fprintln(w, "ok")
}

// asset serves an embedded file.
func (s *server) asset(w http.ResponseWriter, r *http.Request) {
	f, ok := s.files[r.PathValue("name")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	protect(w.Header())
	w.Header().Set("Content-Type", f.kind)
	w.Header().Set("ETag", f.etag)
	w.Header().Set("Cache-Control", "no-cache")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.content))
}

// stream answers with events. It takes the connection over from net/http, whose handler would
// cost each reader five times the memory, and leaves it to one goroutine.
func (s *server) stream(w http.ResponseWriter, r *http.Request) {
	if _, ok := s.admit(w, r, false); !ok {
		return
	}
	st, err := s.newStream(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store, no-transform")
	h.Set("X-Accel-Buffering", "no") // nginx holds answers back otherwise
	if r.Method == http.MethodHead {
		return
	}
	if !s.enter(st) {
		s.full()
		h.Set("Connection", "close") // else it stays open, idle, and counts
		unavailable(w, "too many streams")
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.leave(st)
		s.logf("taking over a connection: %v", err)
		return
	}
	h.Set("Connection", "close") // the end of the answer is the end of the connection
	h.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	head := bytes.NewBufferString("HTTP/1.1 200 OK\r\n")
	h.Write(head)
	head.WriteString("\r\n")
	s.mu.Lock()
	st.conn, st.head = conn, head.Bytes()
	s.mu.Unlock()
	s.finished.Go(func() {
		st.run()
		conn.Close()
		s.leave(st)
		s.conns.Add(-1) // net/http does not tell the end of a connection that was taken over
	})
}

// newStream reads what a request for events asks for.
func (s *server) newStream(r *http.Request) (*stream, error) {
	query, err := parseForm(r.URL.RawQuery)
	if err != nil {
		return nil, errors.New("the query is broken")
	}
	st := &stream{log: s.log, poll: query.Has("wait"),
		from: cmp.Or(r.Header.Get("Last-Event-ID"), query.Get("after"))}
	if st.poll {
		st.wait, err = time.ParseDuration(query.Get("wait"))
	}
	if err != nil || st.wait < 0 {
		return nil, errors.New("wait wants 0 or a time such as 25s")
	}
	return st, nil
}

// enter makes the stream one of those that shutdown ends, unless there are too many.
func (s *server) enter(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.streams) >= s.maxStreams {
		return false
	}
	s.streams[st] = struct{}{}
	return true
}

func (s *server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st)
}

// A stream is one reader on its connection.
type stream struct {
	log   *Log
	conn  net.Conn // guarded by the server's mu until run
	head  []byte   // of the answer
	from  string   // the id that the reader has
	poll  bool     // the answer ends when there was something, or after wait
	wait  time.Duration
	at    cursor
	end   uint64    // position of the message that came next when it found its place
	renew time.Time // when the connection's write deadline is to be set anew
}

// run writes the head and then events until the reader is gone, its time is over, or the log is
// closed. Nothing reads the connection: that the reader is gone shows at a later write, of a
// heartbeat at the latest.
func (st *stream) run() {
	low, high := retryLow, retryHigh
	var end <-chan time.Time // of a long poll; nil, and so never, for a stream
	if st.poll {
		low, high = pollRetry, pollRetry
		if st.wait > 0 {
			low, high = longLow, longHigh
		}
		end = time.After(min(st.wait, maxWait))
	}
	if !st.write(append(st.head, retryFrame(low, high)...)) || !st.settle(end) {
		return
	}
	st.head, st.from = nil, "" // the rest of the stream's life may be long
	sent, greeted := 0, false  // bytes of messages; the ping after the backlog or a gap
	for {
		frames, wake := st.log.read(&st.at)
		if len(frames) > 0 && !st.write(frames) {
			return
		}
		if bytes.Equal(frames, gapFrame) {
			greeted = false // the next ping says that the reader has had it
		} else {
			sent += len(frames)
		}
		if st.poll && st.over(sent, wake != nil) {
			st.ping()
			return
		}
		if wake == nil && len(frames) > 0 {
			continue
		}
		if wake == nil {
			st.write(retryFrame(retryLow, retryHigh))
			return
		}
		if !greeted && !st.ping() || greeted && len(frames) == 0 && !st.write(pingFrame) {
			return
		}
		greeted = true
		select {
		case <-wake:
		case <-end:
			st.ping()
			return
		}
	}
}

// over tells whether a poll has brought what it is for: what there was when it found its place,
// or if it is a long one any message. Neither goes on for ever in a room that is faster than its
// reader.
func (st *stream) over(sent int, upToDate bool) bool {
	if st.wait == 0 {
		return st.at.pos >= st.end
	}
	return sent > 0 && upToDate || sent >= maxPoll
}

// ping tells the reader as of which message it is up to date or, when a poll ends early, which one
// was its last.
func (st *stream) ping() bool { return st.write(pingAt(st.log.before(st.at))) }

// settle finds the reader's place. An id that is not known may be on its way from Redis, so the
// reader is told to wait, for a while that counts only while the room is joined; then its place
// is lost. It returns false when the answer is over.
func (st *stream) settle(end <-chan time.Time) bool {
	came, told := time.Now(), false
	for {
		p := st.log.find(st.from)
		if st.at, st.end = p.cursor, p.next; p.known {
			return true
		}
		if p.wake == nil {
			st.write(retryFrame(retryLow, retryHigh))
			return false
		}
		var lapsed <-chan time.Time
		if !p.joined.IsZero() {
			if st.poll && !told && st.from != "" {
				came = st.log.firstAsked(st.from)
			}
			left := st.log.grace - min(time.Since(came), time.Since(p.joined))
			if left <= 0 {
				st.at.pos = lost
				return true
			}
			lapsed = time.After(left)
		}
		if !told && !st.write(waitFrame) || told && p.joined.IsZero() && !st.write(pingFrame) {
			return false
		}
		told = true
		select {
		case <-p.wake:
		case <-lapsed:
		case <-end:
			st.write(pingFrame)
			return false
		}
	}
}

// write writes to the reader and reports whether it could. A write, which is a page at most, has
// writeTimeout at least; its deadline is set only now and then, because setting one is dear.
func (st *stream) write(b []byte) bool {
	if now := time.Now(); now.After(st.renew) {
		st.renew = now.Add(writeRenew)
		st.conn.SetWriteDeadline(now.Add(writeTimeout + writeRenew))
	}
	_, err := st.conn.Write(b)
	return err == nil
}
