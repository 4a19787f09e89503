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
	-origin url          origin to trust, behind a proxy that changes the Host header; may be
	                     repeated, the first is the address to join
	-version             print the version and exit
	-h                   print the flags and exit

	$CHAT_KEY            key that signs the session cookies (default: drawn at random, and
	                     shared through Redis)
	$CHAT_PASSWORD       password of the room (default: none, the room is open)
	$TZ                  zone of the times, such as Asia/Shanghai (default: the machine's)

# HTTP

	GET  /               the chat page (?view=projector: in big type, to read only); without a
	                     session 303 to /login
	GET  /login          the form; POST it with user= (and password=): 303 and a cookie
	POST /logout         303, the cookie gone
	POST /post           message=: 204 when the message is in the room. With an Idempotency-Key
	                     header (16 to 64 of A-Z a-z 0-9 _ -) the same key is the same message,
	                     while it is among the newest 4096; Message-Id says the id that it has.
	                     Else the first that holds of: 403
	                     from another site's page, 401 no session, 415 not a form, 413 over
	                     64 KiB, 400 a broken form or key, 422 no text, 413 over 4000 characters,
	                     429 too fast, 503 not sure that it is in the room
	GET  /stream         recent messages, then live ones, as text/event-stream. After the id in
	                     Last-Event-ID (or ?after=): just what follows it, from any process.
	                     ?wait=25s ends after the first messages, or 25 s (long polling; at most
	                     a minute); ?wait=0 ends at once (polling)
	GET  /ws             the same events as on /stream through a WebSocket, each a text message. One
	                     that comes in is a post: data: lines, and id: if it has a key. The answer
	                     is event: reply, with status and id, or reason and retryAfter, in JSON
	GET  /lesson         the four ways to receive, side by side
	GET  /healthz        200 ok, or 503 and why
	GET  /metrics        numbers for a Prometheus on this machine; 404 to others
	GET  /assets/...     style, scripts and icons of the pages

Behind a proxy on the same machine, X-Forwarded-For tells whose address counts; from any proxy,
X-Forwarded-Proto: https makes the cookie Secure.

A message on the stream is

	id: 4VXCQ6ZTJ5MHN3D2KAEWRYB7UF~k3x7apqz
	data: [12:34:56] 小明: 你好

with a data line for each line of the text, and the time of the process. The id is the key, which
names the message, and a tail that the accepting process draws, so that nobody who posts an old key
again can move the place of a reader. The first event of an answer has retry:, the milliseconds
after which to come back. Three more events have a name and empty data: ping (up to date, with the
id as of which; again after a gap, and without the id after 15 s of silence), wait (the id you came
with is not known here yet; until it is, a ping only shows that the connection lives) and gap (what
follows does not join what you had; messages may be missing, and the recent ones come again).

# Redis

	channel chat         the line and nothing else: [12:34:56] 小明: 你好
	channel chat:id      the id of the line that comes next on chat
	channel chat:probe   every 5 s a random word of each process, the probe: it shows that what
	                     is published here comes back. "rewritten " before it says that the list
	                     or the key was written back, and the other processes join again
	list    chat:history id, space, line; newest last. 4608 are kept, and the newest 4096 are the
	                     history. The line !gap says that messages may be missing before it
	string  chat:key     the key of the cookies: the time it was drawn in 16 hex digits, a dash, a
	                     random word; of two the older is the room's

What other programs publish on chat is shown too. A line break of the text is U+2028 in Redis.

# What is kept

The program writes nothing to disk; Redis may. The newest 4096 messages live in each process, and
in the Redis list. The browser keeps the cookie chat_session for 30 days: v1, expiry, a random id
of the login, the name (base64url) and a MAC over these, between dots. It is signed, not secret.

# Reading order

The file is told from the outside in: start (run, configure), the room and its Log, frames and
cleaning (encode, clean), sessions (signer), limits (limiter), the server and its handlers (server,
accept), the stream (stream.run) and its way through a WebSocket (handshake, readFrame), and last
Redis (reconcile, broker, feed). The idea is in Log: an entry is encoded once, readers are positions
in one ring, and an id names an entry, so whoever has its key drops a copy. The room in memory can
be understood without the broker.
*/
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"html/template"
	"io"
	"log"
	"maps"
	"math"
	mathrand "math/rand/v2"
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
	_ "time/tzdata" // $TZ counts in a container of this file alone too
	"unicode"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
)

const (
	ringSize   = 4096     // entries of the log, and those of the Redis list that are history
	blockSize  = 16 << 10 // bytes of frames that lie side by side and are written at once
	framesSize = 18 << 10 // bytes of a block's events as WebSocket frames, a head on each
	maxName    = 24       // code points of a name
	maxMarks   = 3        // marks in a row in a name, on one letter
	maxMessage = 4000     // code points of a message
	maxLine    = 4100     // code points of a line from Redis; time, name and message fit
	maxBody    = 64 << 10 // bytes of a form, and of a message through a WebSocket
	maxHeader  = 16 << 10 // bytes of a request's header

	postBurst  = 10  // messages of one sender at once; then -rate a second
	floodBurst = 500 // messages from one address at once,
	floodRate  = 50  // and then so many a second
	loginBurst = 400 // logins from one address at once,
	loginRate  = 5   // and then so many a second
	guessBurst = 20  // wrong passwords from one address at once,
	guessRate  = 1   // and then so many a second

	headerTimeout  = 10 * time.Second // for the header of a request to come,
	requestTimeout = 20 * time.Second // and for the whole request
	answerTimeout  = 30 * time.Second // from the header to the end of an answer that is no stream
	idleTimeout    = 75 * time.Second // longer than a proxy's usual minute: the proxy closes first

	heartbeat    = 15 * time.Second       // silence after which every stream gets a ping
	paceEach     = 20 * time.Microsecond  // from one round of readers to the next, for each of them,
	paceMost     = 50 * time.Millisecond  // and at most
	writeTimeout = 30 * time.Second       // for a reader to take one block
	writeRenew   = 15 * time.Second       // how late a write's deadline may be, to set it rarely
	sendBuffer   = 24 << 10               // bytes the kernel keeps for a reader; Linux doubles it
	readBuffer   = 4 << 10                // bytes it takes from a reader, who has nothing to say
	pongTimeout  = 45 * time.Second       // for a WebSocket's peer to send anything after a ping,
	closeTimeout = 2 * time.Second        // and to close its side behind ours
	askTimeout   = 2 * time.Second        // that a poll waits at least for its place to be known
	maxWait      = time.Minute            // longest ?wait=
	maxPoll      = 64 << 10               // bytes after which a long poll ends, too
	retryLow     = 1000                   // ms after which readers come back when the process ends,
	retryHigh    = 4000                   // spread up to this
	pollRetry    = 2000                   // ms between polls
	longLow      = 200                    // ms between long polls,
	longHigh     = 400                    // spread up to this
	sessionLife  = 30 * 24 * time.Hour    // of a cookie
	stopTimeout  = 400 * time.Millisecond // what shutdown leaves to answers under way

	confirmTimeout = 2 * time.Second        // from POST to the message coming back
	dialTimeout    = 10 * time.Second       // the name of Redis and all its addresses
	redisTimeout   = 2 * time.Second        // one write, and what a read waits for the next byte
	syncEvery      = 5 * time.Second        // between two round trips of our probe through Redis
	syncTimeout    = 2 * time.Second        // within which it must come back,
	joinTimeout    = 10 * time.Second       // the first time behind all that came with the list
	rejoinPause    = 400 * time.Millisecond // between attempts to join, half to one and a half of it
	keyGrace       = 2 * syncEvery          // in which an older cookie key comes back
	restoreTries   = 5                      // of writing the list back against others
	batchSize      = 64                     // posts that share one round trip to Redis
	keptFor        = 30 * 24 * time.Hour    // by Redis, after the last process of the room,
	keptRenew      = time.Hour              // which says so often that it lives

	spareFiles = 24          // descriptors that connections leave: Redis, its redial, the listener
	busyConns  = 8           // connections kept to answer 503 when all others are taken
	floodPause = time.Minute // between two words in the log on what is refused
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
func run(ctx context.Context, args []string, getenv func(string) string,
	stdout, stderr io.Writer) error {
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
			cfg.addr, errors.Unwrap(err), other)
	}
	s.urls = roomURLs(ln.Addr())
	fmt.Fprintf(stdout, "chat: open %s\n", strings.Join(s.urls, " or "))
	fmt.Fprintf(stdout, "chat: %s\n", cfg.where())

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var brokerDone sync.WaitGroup
	if s.room.broker != nil {
		brokerDone.Go(func() { s.room.broker.run(ctx) })
	}
	srv := s.httpServer(ctx)
	served := make(chan error, 1)
	go func() {
		served <- srv.Serve(ln)
		cancel() // when nobody asked it to, the listener broke
	}()
	<-ctx.Done()
	s.shutdown(srv)
	brokerDone.Wait()
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
	origin        string // the first of them, where people open the room
	key, password string
}

// A usageError is a mistake in how the program was called. It never contains an argument that
// may hold a password.
type usageError struct{ error }

func usagef(format string, args ...any) error {
	return usageError{fmt.Errorf(format+" (chat -h lists the flags)", args...)}
}

// configure reads flags and environment. It returns nil and no error when the answer was to
// print the manual or the version.
func configure(args []string, getenv func(string) string, stdout io.Writer) (*config, error) {
	// A line that was read from a file may have kept its end.
	trim := func(text string) string { return cmp.Or(strings.TrimRight(text, "\r\n"), text) }
	c := &config{key: trim(getenv("CHAT_KEY")), password: trim(getenv("CHAT_PASSWORD"))}
	flags := flag.NewFlagSet("chat", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&c.addr, "addr", ":8989", "address to listen on, `host:port`")
	server := flags.String("redis", "", "`server` that shares the room: host:port, or a "+
		"redis:// or rediss:// URL\n(default $REDIS_URL; when that is empty, a room in memory)")
	flags.StringVar(&c.channel, "channel", "chat", "Redis channel `name` of the room")
	flags.IntVar(&c.history, "history", 200, "messages that a newcomer gets, at most 4096")
	flags.Float64Var(&c.rate, "rate", 5, "messages a second for one sender after a burst of 10;\n"+
		"0 is no limit, neither here nor on logging in")
	flags.Func("origin", "origin `url` to trust, behind a proxy that changes the Host header;\n"+
		"may be repeated, the first is the address to join", c.trust)
	version := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		flags.SetOutput(stdout)
		fmt.Fprint(stdout, "Usage: chat [flags]\n\n"+
			"A web chat room; open the address it prints.\n\n")
		flags.PrintDefaults()
		fmt.Fprint(stdout, "\nEnvironment: CHAT_KEY signs the session cookies, "+
			"CHAT_PASSWORD closes the room.\n")
		return nil, nil
	} else if err != nil {
		return nil, usagef("%s", strings.ReplaceAll(redact(err.Error()), "\n", " "))
	}
	if flags.NArg() > 0 {
		return nil, usagef("unexpected argument %q; "+
			"an address goes behind -addr, as in -addr :8990", redact(flags.Arg(0)))
	}
	if *version {
		fmt.Fprintln(stdout, versionLine())
		return nil, nil
	}
	var err error
	if text := cmp.Or(*server, trim(getenv("REDIS_URL"))); text != "" {
		if c.redis, err = parseRedis(text); err != nil {
			return nil, err
		}
	}
	zone := strings.TrimPrefix(getenv("TZ"), ":") // Go takes a wrong one for UTC and says nothing
	if _, err := time.LoadLocation(zone); err != nil && zone[0] != '/' {
		return nil, usagef("TZ wants a name such as Asia/Shanghai, not %q", redact(zone))
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
	for name, value := range map[string]string{"CHAT_KEY": c.key, "CHAT_PASSWORD": c.password} {
		if !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
			return usagef("%s wants one line of UTF-8 without control characters", name)
		}
	}
	odd := func(r rune) bool { return !unicode.IsGraphic(r) || r == ' ' }
	beside := []string{":id", ":probe", ":history", ":key", ":here", ":act", ":state"}
	if c.channel == "" || strings.ContainsFunc(c.channel, odd) || slices.ContainsFunc(beside,
		func(end string) bool { return strings.HasSuffix(c.channel, end) }) {
		return usagef("-channel wants a name without spaces that does not end in %s, not %q",
			strings.Join(beside, " "), redact(c.channel))
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
	bad := usagef("-redis (or REDIS_URL) wants host:port or a redis:// or rediss:// URL, such as " +
		"localhost:6379; / # ? and %% of a password are written %%2F %%23 %%3F and %%25")
	if !strings.Contains(text, "://") {
		host, port, ok := splitAddr(text)
		if !ok {
			return nil, bad
		}
		text = "redis://" + net.JoinHostPort(cmp.Or(host, "localhost"), port)
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "redis" && u.Scheme != "rediss" || u.Hostname() == "" ||
		u.RawQuery != "" || u.Fragment != "" {
		return nil, bad
	}
	if _, _, ok := splitAddr(u.Host); u.Port() != "" && !ok {
		return nil, bad
	}
	if db := strings.Trim(u.Path, "/"); db != "" && db != "0" {
		// PUBLISH knows no databases: rooms in two of them would mix.
		return nil, usagef("-redis (or REDIS_URL) wants no database; " +
			"rooms on one Redis are told apart by -channel")
	}
	return u, nil
}

// trust takes a value of -origin, made equal to what browsers send, because it is compared with
// that: something that none of them sends would start the room and let nobody in.
func (c *config) trust(text string) error {
	bad := errors.New("an origin is what browsers send, such as https://chat.example.org or " +
		"http://192.168.1.20:8080; a host beyond ASCII as Punycode (xn--…)")
	lower := strings.TrimSuffix(strings.ToLower(text), "/")
	u, err := url.Parse(lower)
	if err != nil || lower != u.Scheme+"://"+u.Host {
		return bad
	}
	usual := map[string]string{"http": "80", "https": "443"}[u.Scheme]
	port, err := strconv.ParseUint(cmp.Or(u.Port(), usual), 10, 16)
	host := u.Hostname()
	if ip, noIP := netip.ParseAddr(host); noIP == nil {
		host = ip.String()
	} else if strings.Trim(host[strings.LastIndexByte(host, '.')+1:], "0123456789") == "" {
		return bad // browsers make an address of 192.168.1 too, a longer one
	}
	const allowed = "abcdefghijklmnopqrstuvwxyz0123456789-_.:"
	if usual == "" || err != nil || strings.Trim(host, allowed) != "" {
		return bad
	}
	origin := u.Scheme + "://" + net.JoinHostPort(host, strconv.FormatUint(port, 10))
	origin = strings.TrimSuffix(origin, ":"+usual)
	c.origin = cmp.Or(c.origin, origin)
	return c.origins.AddTrustedOrigin(origin)
}

// redact hides what may be a password in a URL, and what stands before that.
func redact(s string) string {
	if at := strings.LastIndexByte(s, '@'); at >= 0 {
		return "…" + s[at:]
	}
	return s
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
	info, _ := debug.ReadBuildInfo() // there is one: this is a module
	line := "chat " + cmp.Or(info.Main.Version, "(devel)")
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			line += ", commit " + s.Value
		}
	}
	return line + ", " + info.GoVersion
}

// A room is what was said, and the one way to say more. Without a broker it lives in this process;
// with one, every process that shares its Redis channel holds the same room.
type room struct {
	log    *Log
	broker *broker  // nil: in memory
	onWay  sync.Map // key of a post that is under way → channel that is closed when it is over
}

// newRoom opens the room of a channel. With Redis nobody gets anything from it until the broker,
// which run starts, has joined.
func newRoom(cfg *config, logf func(string, ...any), gotKey func(string)) *room {
	r := &room{log: newLog(ringSize, cfg.history)}
	if cfg.redis != nil {
		r.broker = newBroker(cfg, r.log, logf, gotKey)
	} else {
		r.log.rebuild(nil, false)
	}
	return r
}

// say puts a line into the room unless its key is there already, and returns the id of the message
// that has the key. An error means that this is not sure: the line may come in later all the same,
// and with its key it is safe to say it again.
//
// With Redis, one attempt is under way for a key. A second one waits for it, and if that was not
// confirmed tries in the time that it has left: each attempt takes a place in the list.
func (r *room) say(ctx context.Context, key, line string) (id string, err error) {
	e := entry{newID(key), line}
	if r.broker == nil {
		id, _ = r.log.append(e)
		return id, nil
	}
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	over := make(chan struct{})
	for {
		first, taken := r.onWay.LoadOrStore(key, over)
		if !taken {
			break
		}
		select {
		case <-first.(chan struct{}):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	defer func() {
		r.onWay.Delete(key)
		close(over)
	}()
	return r.broker.publish(ctx, e)
}

// next returns what a reader is to be told next, and moves its cursor behind that. An id that is
// not known here may be on its way from Redis, which keeps the order of what is published: when a
// round trip that began after the reader came is over, what anybody can have seen before is here.
// Then, and not by any clock, the id is nowhere.
func (r *room) next(c *cursor) news {
	n := r.log.read(c, r.broker == nil)
	if !n.unknown {
		return n
	}
	if c.settled == nil {
		c.settled = r.broker.ask()
	}
	select {
	case <-c.settled:
		return r.log.read(c, true)
	default:
		n.settled = c.settled
		return n
	}
}

// A Log holds the newest entries of the room, encoded once, in one order. Readers are cursors:
// each holds a position and reads on from there, so a newcomer, a reader that comes back, a slow
// one and a live one are the same, and no reader costs the log anything.
//
// Readers wait on a channel that is closed when there is something new. They are woken in rounds:
// what comes after a pause wakes them at once, and the next round begins when this one has had time
// to be written, so that a flood costs fewer and longer writes. An id names one entry: a second
// one under the same key is dropped. A log can be built anew from another list of entries; it then
// begins a new ring, in which each reader goes on behind the entry that it had last.
type Log struct {
	size    int // entries held
	history int // messages a newcomer gets

	mu        sync.Mutex    // guards all below, and the ring's content
	ring      *ring         // of no use until the log is built for the first time
	built     uint64        // how often it was
	added     chan struct{} // closed at the next entry; nil when nobody waits for one
	wake      chan struct{} // closed at the next round
	waiting   int           // readers that this will wake
	notBefore time.Time     // when the next round may begin
	due       bool          // there is something new, and timer begins a round for it
	timer     *time.Timer   // else it beats after silence
	beats     uint64        // so often; each is a round, too
	out       uint64        // entries that readers got,
	bytes     uint64        // and their bytes
	closed    bool
}

// A ring is the entries of a log between two times that it was built.
type ring struct {
	slots  []slot            // the entry at position p is in slots[p%len(slots)]
	oldest uint64            // position of the oldest entry held
	next   uint64            // position of the next entry
	index  map[string]uint64 // key of each entry held → its position
	block  *block            // where the next frame goes
}

// A slot is an entry and where its frame lies.
type slot struct {
	entry
	block *block
	off   int // of the frame in the block
}

// A block is a stretch of frames in memory. It is only ever appended to, within its capacity, so
// what a reader got of it stays as it was. A gap has one of its own, so that it can be left out.
type block struct {
	buf  []byte
	next uint64 // position after the last entry
}

// An entry is what the room holds under an id: a message, whose line is what people read, its line
// breaks LF, or an act, whose line begins with "!".
type entry struct{ id, line string }

const gapLine = "!gap" // the act that says: messages may be missing before this

// keyOf returns what an id is known by. Who posts a message again brings its key; what stands
// behind it was drawn by the process that accepted it, so that nobody can move the place of readers
// who sleep at an old id. An id with a dot is that of a foreign line, and its own key.
func keyOf(id string) string {
	if end := strings.IndexByte(id, '~'); end >= 0 && strings.IndexByte(id, '.') < 0 {
		return id[:end]
	}
	return id
}

func newID(key string) string { return key + "~" + strings.ToLower(rand.Text()[:8]) }

// base returns the id of the announced entry before a foreign line, and whether it is one.
func (e entry) base() (id string, foreign bool) {
	id, _, foreign = strings.Cut(e.id, ".")
	return id, foreign
}

// act tells an act from a message. A foreign line may begin with anything.
func (e entry) act() bool { return strings.HasPrefix(e.line, "!") && !strings.Contains(e.id, ".") }
func (e entry) gap() bool { return e.line == gapLine && e.act() }

// A cursor is the place of a reader: an id, and where that is in the ring. Only its reader uses it.
type cursor struct {
	after   string          // id of the entry it had last; "0" at the beginning, "" for a newcomer
	settled <-chan struct{} // closed when a round trip shows that an unknown id is nowhere
	built   uint64          // the ring that pos is a position in, as Log.built; 0: not found yet
	pos     uint64          // position to read next
	told    uint64          // gaps before this position it was told, or came after
	goal    uint64          // where the log ended when it found its place, or was told a gap
	beats   uint64          // of the log, when this last read
}

// lost is the position of a reader whose place is not in the log.
const lost uint64 = math.MaxUint64

// News is what a reader is to be told next.
type news struct {
	frames  []byte          // entries, or a gap; must not be changed
	gap     bool            // it is a gap: what comes then does not join what came before
	ping    bool            // a heartbeat has passed, and nothing is new
	unknown bool            // the reader's place is not known yet
	more    bool            // there is more at once
	ended   bool            // behind the frames the log ends
	wake    <-chan struct{} // closed when there may be more
	settled <-chan struct{} // the cursor's, while its place is unknown
}

// newLog returns a log of which nobody gets anything until it is built.
func newLog(size, history int) *Log {
	l := &Log{size: size, history: history, ring: newRing(size), wake: make(chan struct{})}
	l.mu.Lock() // round, which the timer runs, reads it
	defer l.mu.Unlock()
	l.timer = time.AfterFunc(heartbeat, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !l.due {
			l.beats++
		}
		l.round()
	})
	return l
}

// broadcast wakes everybody who waits: the readers when their next round may begin. The caller
// holds mu.
func (l *Log) broadcast() {
	if l.added != nil {
		close(l.added)
		l.added = nil
	}
	if wait := time.Until(l.notBefore); wait <= 0 {
		l.round()
	} else if !l.due {
		l.due = true
		l.timer.Reset(wait)
	}
}

// round wakes the readers. The caller holds mu.
func (l *Log) round() {
	close(l.wake)
	l.notBefore = time.Now().Add(min(time.Duration(l.waiting)*paceEach, paceMost))
	l.wake, l.waiting, l.due = make(chan struct{}), 0, false
	if !l.closed {
		l.timer.Reset(heartbeat)
	}
}

// append adds the entry unless its key is known, and returns the id of the entry that has the key.
func (l *Log) append(e entry) (id string, added bool) {
	frame := encode(e)
	l.mu.Lock()
	defer l.mu.Unlock()
	if pos, known := l.ring.index[keyOf(e.id)]; known {
		return l.ring.at(pos).id, false
	}
	l.ring.add(e, frame)
	l.broadcast()
	return e.id, true
}

// rebuild makes these, of which no two have the same key, the entries of the log. If older is
// set there were others before them, so that who has read nothing yet has missed something.
func (l *Log) rebuild(entries []entry, older bool) {
	r := newRing(l.size)
	if older {
		r.next, r.oldest = 1, 1
	}
	for _, e := range entries {
		r.add(e, encode(e))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring = r
	l.built++
	l.broadcast()
}

// entries returns what is held, oldest first.
func (l *Log) entries() (all []entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for pos := l.ring.oldest; pos < l.ring.next; pos++ {
		all = append(all, l.ring.at(pos).entry)
	}
	return all
}

// numbers returns how many entries are held, how many readers got, and of how many bytes.
func (l *Log) numbers() (held, out, bytes uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ring.next - l.ring.oldest, l.out, l.bytes
}

// close ends every reader once it has read to the end.
func (l *Log) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.timer.Stop()
	l.round()
}

// idOf returns the id of the entry with this key, "" if there is none.
func (l *Log) idOf(key string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if pos, known := l.ring.index[key]; known {
		return l.ring.at(pos).id
	}
	return ""
}

// addition returns what is closed at the next entry.
func (l *Log) addition() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.added == nil {
		l.added = make(chan struct{})
	}
	return l.added
}

// read returns what is next for a reader, at most a block, and moves the cursor behind it. A reader
// that fell off the ring's end, or whose place is nowhere, is told a gap and goes on as a newcomer.
// One that comes to an entry that is a gap is told that, and goes back to where a newcomer begins:
// what it lacks may stand before. If final, an id that is not here is nowhere.
func (l *Log) read(c *cursor, final bool) (n news) {
	l.mu.Lock()
	defer l.mu.Unlock()
	beat := c.beats != l.beats
	c.beats = l.beats
	n.unknown = !l.place(c, final)
	r := l.ring
	switch {
	case n.unknown:
	case c.pos < r.oldest || c.pos > r.next:
		l.restart(c, r.recent(l.history))
		n.frames, n.gap = gapFrame, true
	default:
		for c.pos < min(r.next, c.told) && r.at(c.pos).gap() {
			c.pos++
		}
		if c.pos < r.next {
			s := r.at(c.pos)
			n.frames, n.gap = s.block.buf[s.off:], s.gap()
			l.out, l.bytes = l.out+s.block.next-c.pos, l.bytes+uint64(len(n.frames))
			c.pos = s.block.next
		}
		if c.after = r.before(c.pos); n.gap {
			l.restart(c, min(c.pos, r.recent(l.history)))
		}
	}
	n.ping = beat && len(n.frames) == 0
	n.more = !n.unknown && c.pos < r.next
	n.ended = l.closed && !n.more
	n.wake = l.wake
	if !n.more {
		l.waiting++
	}
	return n
}

// place finds where in the ring a reader goes on: behind the id it has, at the beginning for "0",
// with the history for "". It returns false while that is not known. The caller holds mu.
func (l *Log) place(c *cursor, final bool) bool {
	r := l.ring
	if l.built == 0 {
		return false
	}
	if c.built == l.built {
		return true
	}
	if c.after == "" {
		l.restart(c, r.recent(l.history))
		return true
	}
	pos := lost
	if c.after == "0" || validID(c.after) {
		if pos = r.behind(c.after); pos == lost && !final {
			return false
		}
	}
	*c = cursor{after: c.after, built: l.built, pos: pos, goal: r.next, beats: c.beats}
	return true
}

// restart makes the reader a newcomer who begins at pos. The caller holds mu.
func (l *Log) restart(c *cursor, pos uint64) {
	next := l.ring.next
	*c = cursor{after: l.ring.before(pos), built: l.built, pos: pos, told: next, goal: next,
		beats: c.beats}
}

func newRing(size int) *ring {
	return &ring{slots: make([]slot, size), index: make(map[string]uint64, size)}
}

// at returns the slot of a position that is held.
func (r *ring) at(pos uint64) *slot { return &r.slots[pos%uint64(len(r.slots))] }

// add puts an entry, whose key is not known, and its frame at the end.
func (r *ring) add(e entry, frame []byte) {
	if r.next-r.oldest == uint64(len(r.slots)) {
		delete(r.index, keyOf(r.at(r.oldest).id))
		r.oldest++
	}
	alone := e.gap()
	if r.block == nil || alone || len(r.block.buf)+len(frame) > cap(r.block.buf) {
		size := max(blockSize, len(frame))
		if alone {
			size = len(frame)
		}
		r.block = &block{buf: make([]byte, 0, size)}
	}
	*r.at(r.next) = slot{e, r.block, len(r.block.buf)}
	r.block.buf = append(r.block.buf, frame...)
	r.index[keyOf(e.id)] = r.next
	r.next++
	r.block.next = r.next
}

// behind returns the position after an id, or lost. A foreign line that is not here is looked for
// by the announced one before it.
func (r *ring) behind(id string) uint64 {
	if id == "0" {
		return 0
	}
	if pos, known := r.index[keyOf(id)]; known && r.at(pos).id == id {
		return pos + 1
	}
	if base, foreign := (entry{id: id}).base(); foreign {
		return r.behind(base)
	}
	return lost
}

// before returns the id of the entry before a position: "0" at the beginning, "" if it is not held.
func (r *ring) before(pos uint64) string {
	switch {
	case pos == 0:
		return "0"
	case pos <= r.oldest || pos > r.next:
		return ""
	}
	return r.at(pos - 1).id
}

// recent returns the position before the newest messages, where a newcomer begins.
func (r *ring) recent(messages int) uint64 {
	pos := r.next
	for n := 0; pos > r.oldest && n < messages; pos-- {
		if !r.at(pos - 1).act() {
			n++
		}
	}
	return pos
}

// The frames of the events that are not messages and have no id. The empty data line makes a
// browser dispatch them (HTML, section 9.2.6); without an id they leave its Last-Event-ID alone.
var (
	gapFrame  = []byte("event: gap\ndata:\n\n")
	waitFrame = []byte("event: wait\ndata:\n\n")
	pingFrame = []byte("event: ping\ndata:\n\n")
)

// encode returns the frame of an entry: a data line for each line of a message's text. A browser
// takes one space after the colon away (HTML, section 9.2.6), so the text keeps its own first one.
// Of an act that this version does not know only the id counts, and nothing is shown.
func encode(e entry) []byte {
	switch {
	case e.gap():
		return []byte("event: gap\nid: " + e.id + "\ndata:\n\n")
	case e.act():
		return nil
	}
	lines := strings.ReplaceAll(e.line, "\n", "\ndata: ")
	return []byte("id: " + e.id + "\ndata: " + lines + "\n\n")
}

// pingAt returns the ping that tells a reader it is up to date as of this id. (Each reader keeps the
// stack that its deepest call took, and fmt's is twice as deep as all else.)
func pingAt(id string) []byte {
	if id == "" {
		return pingFrame
	}
	return []byte("event: ping\nid: " + id + "\ndata:\n\n")
}

// retryLine tells the browser when to come back after the answer has ended: after low to high
// milliseconds, so that a class does not come back in one instant. It stands in the block of an
// event, because some clients take a block of its own for an empty message.
func retryLine(low, high int) []byte {
	return []byte("retry: " + strconv.Itoa(low+mathrand.IntN(high-low+1)) + "\n")
}

// validKey tells whether s can be an Idempotency-Key.
func validKey(s string) bool {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	return len(s) >= 16 && len(s) <= 64 && strings.Trim(s, letters+"0123456789_-") == ""
}

// validID tells whether s can be the id of an entry, so that it may be on its way from Redis.
func validID(s string) bool {
	base, hash, foreign := strings.Cut(s, ".")
	if foreign && (len(hash) != 8 || strings.Trim(hash, "abcdefghijklmnopqrstuvwxyz") != "") {
		return false
	}
	return announcedID(base) || foreign && base == "0"
}

// announcedID tells whether s can be the id of an entry that is not a foreign line.
func announcedID(s string) bool {
	key, tail, _ := strings.Cut(s, "~")
	return validKey(key) && len(tail) == 8 &&
		strings.Trim(tail, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

// clean returns s as the room shows it: CRLF and whatever ends a line somewhere are line breaks
// (LF), bytes that are not UTF-8 become U+FFFD, and control characters except tab and those that
// turn the writing direction are dropped. What is left is one line to any reader between two LF,
// also to one that splits at more than the standard does and could else be sent a forged event.
// Of more than limit characters, cut is true and the rest gone.
func clean(s string, limit int) (text string, cut bool) {
	s = strings.Map(func(r rune) rune {
		switch {
		case strings.ContainsRune("\r\v\f\u0085\u2028\u2029", r):
			return '\n'
		case r != '\n' && r != '\t' && unicode.In(r, unicode.Cc, unicode.Bidi_Control):
			return -1
		}
		return r
	}, strings.ReplaceAll(s, "\r\n", "\n"))
	n := 0
	for i := range s {
		if n == limit {
			return strings.Clone(s[:i]), true // the rest may be long
		}
		n++
	}
	return s, false
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

// cleanName returns the name as the room shows it or why it cannot be one: the key of a text and,
// where a character is at fault, a space and that.
func cleanName(s string) (name, reason string) {
	name = strings.NewReplacer("\ufe0f", "", "\u200d", "").Replace(s)
	name = strings.Join(strings.Fields(name), " ")
	solid := func(r rune) bool { return unicode.In(r, unicode.L, unicode.N, unicode.S) }
	if !utf8.ValidString(s) {
		return "", fmt.Sprintf("name_chars %U", utf8.RuneError)
	}
	if utf8.RuneCountInString(name) > maxName {
		return "", "name_long"
	}
	if r, ok := unfit(name); ok {
		return "", fmt.Sprintf("name_chars %#U", r)
	}
	if !strings.ContainsFunc(name, solid) {
		return "", "name_empty"
	}
	return name, ""
}

// unfit returns the first character that a name must not have. The brackets and the colon are the
// grammar of the line, U+FFFC stands for what is not there. Among Latin letters, Cyrillic and Greek
// ones that look the same would pass for somebody else; marks in a heap cover other people's lines.
func unfit(name string) (r rune, found bool) {
	latin := strings.ContainsFunc(name, func(r rune) bool { return unicode.Is(unicode.Latin, r) })
	marks := 0
	for _, r := range name {
		if marks++; !unicode.IsMark(r) {
			marks = 0
		}
		switch {
		case strings.ContainsRune(":[]\ufffc", r), marks > maxMarks,
			latin && unicode.In(r, unicode.Cyrillic, unicode.Greek),
			r != ' ' && invisible(r),
			r != ' ' && !unicode.In(r, unicode.L, unicode.M, unicode.N, unicode.P, unicode.S):
			return r, true
		}
	}
	return 0, false
}

// A signer makes and checks the values of session cookies.
type signer struct {
	key   []byte
	drawn time.Time // when the cookie key was drawn, zero if it does not say
}

// newSigner derives the signing key, so that another password is another key and ends every
// session.
func newSigner(key, password string) *signer {
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte("chat session v1" + password))
	k := &signer{key: mac.Sum(nil)}
	text, _, _ := strings.Cut(key, "-")
	if ns, err := strconv.ParseInt(text, 16, 64); err == nil && len(text) == 16 {
		k.drawn = time.Unix(0, ns)
	}
	return k
}

// drawKey returns a new cookie key, which begins with the time.
func drawKey(now time.Time) string { return fmt.Sprintf("%016x-%s", now.UnixNano(), rand.Text()) }

// A session is what a cookie says: who, until when, and which login it was.
type session struct {
	id, name string
	expires  time.Time
}

// sign returns the cookie's value: version, expiry, id and name, and the MAC over these as they
// stand. The name is encoded because http.SetCookie drops what RFC 6265 forbids.
func (k *signer) sign(s session) string {
	name := base64.RawURLEncoding.EncodeToString([]byte(s.name))
	body := fmt.Sprintf("v1.%d.%s.%s", s.expires.Unix(), s.id, name)
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
	s, ok = parseSession(value)
	return s, ok && now.Before(s.expires)
}

// parseSession returns what a cookie's value says, true or not.
func parseSession(value string) (session, bool) {
	part := strings.Split(value, ".")
	if len(part) != 5 || part[0] != "v1" {
		return session{}, false
	}
	expires, err := strconv.ParseInt(part[1], 10, 64)
	name, err2 := base64.RawURLEncoding.DecodeString(part[3])
	s := session{id: part[2], name: string(name), expires: time.Unix(expires, 0)}
	return s, err == nil && err2 == nil
}

// young tells whether the key was drawn so lately that an older one may yet turn out to be the
// room's: Redis had forgotten it, and who holds it puts it back.
func (k *signer) young(now time.Time) bool {
	age := now.Sub(k.drawn)
	return 0 <= age && age < keyGrace
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

	mu    sync.Mutex           // guards all below
	whole map[string]time.Time // key → when its tokens are all back
	limit int                  // above this size, those whose moment has passed are taken out
}

// take takes a token, or returns how long until there is one.
func (l *limiter) take(key string, now time.Time) (wait time.Duration) {
	if l.every == 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.whole == nil || len(l.whole) > l.limit {
		kept := map[string]time.Time{}
		for k, t := range l.whole {
			if t.After(now) {
				kept[k] = t
			}
		}
		l.whole, l.limit = kept, 2*len(kept)+1000
	}
	whole := l.whole[key]
	if whole.Before(now) {
		whole = now
	}
	if wait = whole.Sub(now) - time.Duration(l.burst-1)*l.every; wait > 0 {
		return wait
	}
	l.whole[key] = whole.Add(l.every)
	return 0
}

// giveBack returns a token that was not used.
func (l *limiter) giveBack(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if whole, ok := l.whole[key]; ok {
		l.whole[key] = whole.Add(-l.every)
	}
}

// A tally counts what messages were answered, and what the limits refuse. While they do, it tells the
// log once in floodPause how much that was, and whose most of it.
type tally struct {
	logf func(format string, args ...any)

	mu      sync.Mutex        // guards all below
	answers map[string]uint64 // status → posts
	refused map[string]uint64 // what was refused → how often
	recent  map[refusal]int   // the same since the log was told
}

// A refusal is what was refused, and to whom.
type refusal struct{ what, whose string }

func (t *tally) add(what, whose string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.recent) == 0 {
		t.recent = map[refusal]int{}
		time.AfterFunc(floodPause, t.tell)
	}
	t.recent[refusal{what, whose}]++
	t.refused[what]++
}

func (t *tally) answer(status int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.answers[strconv.Itoa(status)]++
}

// tell tells the log, and counts anew.
func (t *tally) tell() {
	t.mu.Lock()
	recent := t.recent
	t.recent = nil
	t.mu.Unlock()
	sum, most := map[string]int{}, map[string]string{}
	for r, n := range recent {
		sum[r.what] += n
		if n > recent[refusal{r.what, most[r.what]}] {
			most[r.what] = r.whose
		}
	}
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(sum)) {
		parts = append(parts, fmt.Sprintf("%d %s (most %s)", sum[what], what, most[what]))
	}
	t.logf("refused in the last minute: %s", strings.Join(parts, ", "))
}

// totals returns what posts were answered and what was refused since the start.
func (t *tally) totals() (answers, refused map[string]uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.answers), maps.Clone(t.refused)
}

// A server is the room as HTTP shows it.
//
// Fields without another guard are set before the first request and only read after that.
type server struct {
	cfg    *config
	logf   func(format string, args ...any)
	room   *room
	signer atomic.Pointer[signer] // nil while the key is not known
	urls   []string               // where the room can be opened

	pages *template.Template
	texts map[string]map[string]string // language → key → text
	mux   *http.ServeMux

	posts, floods, logins, guesses limiter // by session or address, and three by address
	tally                          tally   // what these refuse, among other answers

	maxConns int
	conns    atomic.Int64  // open connections, streams among them
	streams  chan struct{} // holds one for each stream, as many as may be
	full     limiter       // of telling the log that they are too many

	buffers sync.Pool       // of [framesSize]byte, in which WebSockets make frames
	cut     context.Context // when it ends, so does the connection of every stream
	cutOff  func()
}

// fileLimit returns how many descriptors the process may open, of a boundless limit so many that
// each place for a stream can be taken at the end. Linux tells; elsewhere Go has already raised the
// limit to more than the answer here.
func fileLimit() int {
	limits, _ := os.ReadFile("/proc/self/limits")
	_, files, _ := strings.Cut(string(limits), "\nMax open files")
	n := 8192
	fmt.Sscan(files, &n) // leaves it where the limit is no number
	return min(n, 1<<17)
}

func newServer(cfg *config, logf func(string, ...any)) (*server, error) {
	s := &server{cfg: cfg, logf: logf}
	s.buffers.New = func() any { return new([framesSize]byte) }
	s.cut, s.cutOff = context.WithCancel(context.Background())
	s.tally = tally{logf: logf, answers: map[string]uint64{"204": 0},
		refused: map[string]uint64{"logins": 0, "passwords": 0, "posts": 0}}
	conns, streams := capacity(fileLimit())
	s.maxConns, s.streams = conns, make(chan struct{}, streams)
	s.full = limiter{every: floodPause, burst: 1}
	if cfg.rate > 0 {
		s.posts = limiter{every: time.Duration(float64(time.Second) / cfg.rate), burst: postBurst}
		s.floods = limiter{every: time.Second / floodRate, burst: floodBurst}
		s.logins = limiter{every: time.Second / loginRate, burst: loginBurst}
		s.guesses = limiter{every: time.Second / guessRate, burst: guessBurst}
	}
	setKey := func(key string) { s.signer.Store(newSigner(key, cfg.password)) }
	s.room = newRoom(cfg, logf, setKey)
	if cfg.key != "" || cfg.redis == nil {
		setKey(cmp.Or(cfg.key, rand.Text()))
	}
	s.mux = s.routes()
	return s, s.loadAssets()
}

// capacity returns how many connections the process serves with so many descriptors, and how
// many of them may be streams: the others can still post.
func capacity(files int) (conns, streams int) {
	conns = max(files-spareFiles-busyConns, busyConns)
	return conns, conns - conns/8
}

// loadAssets parses the embedded pages and texts.
func (s *server) loadAssets() error {
	pages, err := template.New("").Option("missingkey=error").ParseFS(assets,
		"assets/*.html", "assets/metrics.txt")
	texts, err2 := assets.ReadFile("assets/strings.json")
	s.pages = pages
	return cmp.Or(err, err2, json.Unmarshal(texts, &s.texts))
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
		s.tellFull()
		return context.WithValue(ctx, busy{}, true)
	}
	return ctx
}

// tellFull logs, at most once in a while, that not everybody finds room.
func (s *server) tellFull() {
	if s.full.take("", time.Now()) == 0 {
		s.logf("full: %d of %d connections are open, %d of them may be streams; a higher limit of "+
			"open files (ulimit -n) makes room for more", s.conns.Load(), s.maxConns, cap(s.streams))
	}
}

// shutdown ends everything within stopTimeout. Posts that wait have been told by their context;
// streams tell their reader when to come back.
func (s *server) shutdown(srv *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	s.room.log.close()
	context.AfterFunc(ctx, s.cutOff)
	srv.Shutdown(ctx)
	srv.Close()
	for range cap(s.streams) { // when every place is taken no stream is left, and none can begin
		s.streams <- struct{}{}
	}
}

// routes says who answers what. The patterns give 404, and 405 with Allow, by themselves.
func (s *server) routes() *http.ServeMux {
	s.cfg.origins.SetDenyHandler(http.HandlerFunc(otherSite))
	ownSite := func(h http.HandlerFunc) http.Handler { return s.cfg.origins.Handler(h) }
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.chat)
	mux.HandleFunc("GET /login", s.loginForm)
	mux.Handle("POST /login", ownSite(s.login))
	mux.Handle("POST /logout", ownSite(s.logout))
	mux.Handle("POST /post", ownSite(s.post))
	mux.HandleFunc("GET /stream", s.stream)
	mux.HandleFunc("GET /ws", s.handshake)
	mux.HandleFunc("GET /lesson", s.lesson)
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /metrics", s.metrics)
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
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; "+
		"img-src 'self'; connect-src 'self'; worker-src 'self'; form-action 'self'; "+
		"base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "same-origin") // with no-referrer a form's Origin would be null
}

// unavailable answers 503.
func unavailable(w http.ResponseWriter, why string) {
	setRetryAfter(w, soon())
	http.Error(w, why, http.StatusServiceUnavailable)
}

// soon is when to try again what cannot be done now: not everybody at once.
func soon() time.Duration { return time.Duration(1+mathrand.IntN(3)) * time.Second }

// setRetryAfter says after how many whole seconds to come back.
func setRetryAfter(w http.ResponseWriter, wait time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
}

// otherSite answers a request that another site's page made the browser send.
func otherSite(w http.ResponseWriter, r *http.Request) {
	http.Error(w, "this request came from a page of another site; if a proxy changes the Host "+
		"header, start chat with -origin and the address that people open", http.StatusForbidden)
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
func (s *server) identify(h http.Header) (session, identity) {
	values, k, now := cookieValues(h), s.signer.Load(), time.Now()
	switch {
	case len(values) == 0:
		return session{}, nobody
	case k == nil:
		return session{}, pending
	}
	for _, value := range values {
		if sess, ok := k.verify(value, now); ok {
			return sess, member
		}
	}
	if k.young(now) {
		return session{}, pending
	}
	return session{}, invalid
}

const cannotTell = "the room cannot tell who you are until Redis is back"

// admit tells whether the sender may take part in the room, and answers if not. To read an open
// room takes no session; but who comes with a broken one must not become anonymous to write.
func (s *server) admit(w http.ResponseWriter, r *http.Request, write bool) (session, bool) {
	sess, who := s.identify(r.Header)
	locked := s.cfg.password != ""
	switch {
	case who == pending && (locked || write):
		unavailable(w, cannotTell)
	case who != member && locked, who == invalid && write:
		http.Error(w, "log in first", http.StatusUnauthorized)
	default:
		return sess, true
	}
	return sess, false
}

// address names where a request comes from: the peer or, behind a proxy on this machine, the last
// address that the proxy names. Of IPv6 it is the /64, which is one subscriber's.
func address(r *http.Request) string {
	ip := parseIP(r.RemoteAddr)
	forwarded := strings.Join(r.Header["X-Forwarded-For"], ",")
	via := strings.Fields(strings.ReplaceAll(forwarded, ",", " "))
	if ip.IsLoopback() && len(via) > 0 {
		if client := parseIP(via[len(via)-1]); client.IsValid() {
			ip = client
		}
	}
	if ip.Is6() {
		prefix, _ := ip.WithZone("").Prefix(64)
		ip = prefix.Addr()
	}
	return ip.String()
}

// parseIP reads an address as peers and proxies write it: with a port or without, one of IPv6 in
// brackets or without. It returns the zero Addr if it is none.
func parseIP(text string) netip.Addr {
	host, _, err := net.SplitHostPort(text)
	if err != nil {
		host = strings.Trim(text, "[]")
	}
	ip, _ := netip.ParseAddr(host)
	return ip.Unmap()
}

// readForm reads a form from the body, or answers why it cannot.
func readForm(w http.ResponseWriter, r *http.Request) (url.Values, bool) {
	const formType = "application/x-www-form-urlencoded"
	kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if !strings.EqualFold(strings.TrimSpace(kind), formType) {
		http.Error(w, "want a form: Content-Type "+formType, http.StatusUnsupportedMediaType)
		return nil, false
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooBig := errors.AsType[*http.MaxBytesError](err); tooBig {
		why := fmt.Sprintf("the form is over %d bytes", maxBody)
		http.Error(w, why, http.StatusRequestEntityTooLarge)
		return nil, false
	}
	if err != nil {
		http.Error(w, "the form did not arrive whole", http.StatusBadRequest)
		return nil, false
	}
	form, err := parseForm(string(body))
	if err != nil {
		http.Error(w, "the form is broken", http.StatusBadRequest)
	}
	return form, err == nil
}

// parseForm splits at & alone, as the URL standard does: net/url also refuses a bare semicolon,
// which curl -d sends.
func parseForm(text string) (url.Values, error) {
	return url.ParseQuery(strings.ReplaceAll(text, ";", "%3B"))
}

// A view is what the pages are made from.
type view struct {
	Lang     string
	T        map[string]string // the texts of that language
	Name     string            // of the session, or to fill in
	Error    string            // login: key of the text that says what was wrong
	Char     string            // login: the character that text is about
	Password bool              // login: the room has one
	View     string            // chat: "projector", or as usual
	Join     string            // chat, lesson: the address to open in the room
	Redis    bool              // lesson: the room is shared
	Channel  string            // lesson: through this channel
	Process  string            // lesson: which process made the page
}

// show writes a page. Pages are about one person, so nothing keeps them.
func (s *server) show(w http.ResponseWriter, r *http.Request, status int, name string, v view) {
	v.Lang = language(r.Header.Get("Accept-Language"))
	v.T = s.texts[v.Lang]
	if v.Char != "" {
		v.T = maps.Clone(v.T)
		v.T[v.Error] = strings.Replace(v.T[v.Error], "{c}", v.Char, 1)
	}
	page := s.render(w, name, v)
	if page == nil {
		return
	}
	protect(w.Header())
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Language", v.Lang)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(page)
}

// render makes a page from its template, or answers that it is broken and returns nil.
func (s *server) render(w http.ResponseWriter, name string, v any) []byte {
	var b bytes.Buffer
	if err := s.pages.ExecuteTemplate(&b, name, v); err != nil {
		s.logf("making %s: %v", name, err)
		http.Error(w, "this page is broken", http.StatusInternalServerError)
		return nil
	}
	return b.Bytes()
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
	sess, who := s.identify(r.Header)
	if who != member {
		turnAway(w, r, who)
		return
	}
	s.show(w, r, http.StatusOK, "chat.html",
		view{Name: sess.name, Join: s.joinURL(r), View: r.URL.Query().Get("view")})
}

// turnAway answers who asks for a page that only members get.
func turnAway(w http.ResponseWriter, r *http.Request, who identity) {
	if who == pending {
		unavailable(w, cannotTell)
		return
	}
	http.SetCookie(w, &http.Cookie{Name: nextName, Value: url.QueryEscape(r.URL.RequestURI()),
		Path: "/", MaxAge: 600, SameSite: http.SameSiteLaxMode})
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

// nextName is the name of the cookie with the page that sent somebody to the login, which leads
// back there. The pages' script sets it too.
const nextName = "chat_next"

// nextPage is where a login leads, once.
func nextPage(w http.ResponseWriter, r *http.Request) string {
	if c, err := r.Cookie(nextName); err == nil {
		http.SetCookie(w, &http.Cookie{Name: nextName, Path: "/", MaxAge: -1})
		switch page, _ := url.QueryUnescape(c.Value); page {
		case "/lesson", "/?view=projector":
			return page
		}
	}
	return "/"
}

// roomURLs lists the addresses at which the room can be opened, the likeliest first.
func roomURLs(addr net.Addr) (urls []string) {
	tcp := addr.(*net.TCPAddr)
	hosts := []string{tcp.IP.String()}
	if tcp.IP.IsUnspecified() {
		out := ""
		// Connecting a UDP socket sends nothing; it asks the kernel for a route.
		if c, err := net.Dial("udp4", "192.0.2.1:9"); err == nil {
			out = c.LocalAddr().(*net.UDPAddr).IP.String()
			c.Close()
		}
		v6 := tcp.IP.To4() == nil
		hosts = append([]string{"localhost"}, likeliest(ownAddresses(), out, v6)...)
	}
	for _, host := range hosts {
		urls = append(urls, "http://"+net.JoinHostPort(host, strconv.Itoa(tcp.Port)))
	}
	return urls
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
		if link.Flags&net.FlagLoopback != 0 || link.Flags&net.FlagRunning == 0 {
			continue
		}
		shared := link.Flags&net.FlagBroadcast != 0
		_, noBridge := os.Stat("/sys/class/net/" + link.Name + "/bridge")
		addrs, _ := link.Addrs()
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil {
				own = append(own, ownAddress{prefix.Addr(), shared, noBridge == nil})
			}
		}
	}
	return own
}

// likeliest orders the addresses by how likely a neighbour reaches them, what is easy to type
// first: the one that has the way out, other networks, bridges, tunnels. What machines give
// themselves on a switch without DHCP, and IPv6 if the room is open there, is named only where
// nothing else is.
func likeliest(own []ownAddress, out string, v6 bool) (hosts []string) {
	order := func(a ownAddress) string { // false comes before true
		leads := a.ip.String() == out
		return fmt.Sprint(a.ip.Is6(), !a.ip.IsGlobalUnicast(), !a.shared, !leads, a.bridge)
	}
	slices.SortStableFunc(own, func(a, b ownAddress) int { return cmp.Compare(order(a), order(b)) })
	for _, a := range own {
		usual := a.ip.Is4() && a.ip.IsGlobalUnicast()
		if usual || hosts == nil && (a.ip.Is4() || v6 && a.ip.IsGlobalUnicast()) {
			hosts = append(hosts, a.ip.String())
		}
	}
	if hosts == nil && out != "" { // Android does not list its links
		hosts = []string{out}
	}
	return hosts
}

// joinURL is the address that others open: the first -origin, since a proxy may have changed the
// Host; else the one this page was opened at, unless only this machine can.
func (s *server) joinURL(r *http.Request) string {
	if s.cfg.origin != "" {
		return s.cfg.origin
	}
	host := (&url.URL{Host: r.Host}).Hostname()
	if (host == "localhost" || parseIP(host).IsLoopback()) && len(s.urls) > 1 {
		return s.urls[1]
	}
	if secure(r) {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

// secure tells whether the browser's side of the connection is TLS, which a proxy ends; of several
// proxies the first one's.
func secure(r *http.Request) bool {
	proto, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Proto"), ",")
	return strings.EqualFold(strings.TrimSpace(proto), "https")
}

func (s *server) loginForm(w http.ResponseWriter, r *http.Request) {
	sess, who := s.identify(r.Header)
	reason := ""
	if who == invalid {
		reason = "session_over"
		for _, value := range cookieValues(r.Header) { // good enough to fill in a form
			sess, _ = parseSession(value)
			sess.name, _ = cleanName(sess.name)
		}
	}
	s.showLogin(w, r, http.StatusOK, sess.name, reason)
}

func (s *server) showLogin(
	w http.ResponseWriter, r *http.Request, status int, name, reason string) {
	key, char, _ := strings.Cut(reason, " ")
	s.show(w, r, status, "login.html",
		view{Name: name, Error: key, Char: char, Password: s.cfg.password != ""})
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
	tooMany := func(of *limiter, what string) bool {
		wait := of.take(from, now)
		if wait > 0 {
			s.tally.add(what, "from "+from)
			setRetryAfter(w, wait)
			s.showLogin(w, r, http.StatusTooManyRequests, typed, "too_many")
		}
		return wait > 0
	}
	if s.cfg.password != "" {
		if tooMany(&s.guesses, "passwords") {
			return
		}
		if !hmac.Equal([]byte(form.Get("password")), []byte(s.cfg.password)) {
			s.showLogin(w, r, http.StatusForbidden, typed, "password_wrong")
			return
		}
		s.guesses.giveBack(from)
	}
	if tooMany(&s.logins, "logins") {
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

// post is accept for a form. What concerns the request comes before what concerns the message.
func (s *server) post(w http.ResponseWriter, r *http.Request) {
	sess, ok := s.admit(w, r, true)
	if !ok {
		return
	}
	form, ok := readForm(w, r)
	if !ok {
		return
	}
	key := rand.Text()
	if keys, ok := r.Header["Idempotency-Key"]; ok {
		key = keys[0]
	}
	status, said, wait := s.accept(r.Context(), sess, address(r), key, form.Get("message"))
	if wait > 0 {
		setRetryAfter(w, wait)
	}
	if status != http.StatusNoContent {
		http.Error(w, said, status)
		return
	}
	w.Header().Set("Message-Id", said)
	w.WriteHeader(status)
}

// accept puts a message into the room and returns 204 and its id, or another status of HTTP, why not
// and, if that helps, after how long to come back. The order of the checks is part of the contract.
// What is refused, or could not be confirmed, costs the sender nothing of the rate.
func (s *server) accept(ctx context.Context, from session, address, key, text string) (
	status int, said string, wait time.Duration) {
	defer func() { s.tally.answer(status) }()
	if !validKey(key) {
		return http.StatusBadRequest, "Idempotency-Key wants 16 to 64 of A-Z a-z 0-9 _ -", 0
	}
	if !utf8.ValidString(text) || blank(text) {
		return http.StatusUnprocessableEntity, "message is missing, blank or not UTF-8", 0
	}
	text, cut := clean(text, maxMessage)
	if cut {
		why := fmt.Sprintf("message is over %d characters", maxMessage)
		return http.StatusRequestEntityTooLarge, why, 0
	}
	if id := s.room.log.idOf(key); id != "" {
		return http.StatusNoContent, id, 0
	}
	if from.name == "" {
		from = session{id: "from " + address, name: "anonymous"}
	}
	now := time.Now()
	if wait := s.posts.take(from.id, now); wait > 0 {
		s.tally.add("posts", fmt.Sprintf("by %q, %s", from.name, address))
		return http.StatusTooManyRequests, "too fast", wait
	}
	if wait := s.floods.take(address, now); wait > 0 {
		s.posts.giveBack(from.id)
		s.tally.add("posts", "from "+address)
		return http.StatusTooManyRequests, "too much from your address", wait
	}
	id, err := s.room.say(ctx, key, now.Format("[15:04:05] ")+from.name+": "+text)
	if err != nil {
		if ctx.Err() == nil { // who hung up may well have posted
			s.posts.giveBack(from.id)
			s.floods.giveBack(address)
		}
		return http.StatusServiceUnavailable, "not sure that the message is in the room; " +
			"with its Idempotency-Key it is safe to send it again", soon()
	}
	return http.StatusNoContent, id, 0
}

func (s *server) lesson(w http.ResponseWriter, r *http.Request) {
	if _, who := s.identify(r.Header); who != member && s.cfg.password != "" {
		turnAway(w, r, who)
		return
	}
	host, _ := os.Hostname()
	s.show(w, r, http.StatusOK, "lesson.html", view{
		Redis: s.cfg.redis != nil, Channel: s.cfg.channel, Join: s.joinURL(r),
		Process: fmt.Sprintf("%s, process %d", cmp.Or(host, "this machine"), os.Getpid())})
}

func (s *server) healthz(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if b := s.room.broker; b != nil {
		if why := b.away(); why != nil {
			unavailable(w, "redis is away: "+whyAway(why))
			return
		}
	}
	fmt.Fprintln(w, "ok")
}

// whyAway tells anybody what kind of error keeps Redis away. The log has its address and its words.
func whyAway(err error) string {
	if _, ok := errors.AsType[redis.Error](err); ok {
		return "it refuses"
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return "it does not answer"
	}
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "dial" {
		return "it cannot be reached"
	}
	return "the room has not joined it"
}

// metrics tells a Prometheus on this machine the numbers of the process. Behind a proxy everybody
// would seem to be on this machine.
func (s *server) metrics(w http.ResponseWriter, r *http.Request) {
	if _, proxied := r.Header["X-Forwarded-For"]; proxied || !parseIP(r.RemoteAddr).IsLoopback() {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	var shared map[string]any // nil: in memory
	if b := s.room.broker; b != nil {
		shared = map[string]any{"away": b.away() != nil, "joins": b.joins.Load(),
			"wrote": b.wrote.Load()}
	}
	held, out, size := s.room.log.numbers()
	answers, refused := s.tally.totals()
	w.Write(s.render(w, "metrics.txt", map[string]any{
		"conns": s.conns.Load(), "maxConns": s.maxConns,
		"readers": len(s.streams), "maxReaders": cap(s.streams),
		"held": held, "out": out, "bytes": size,
		"answers": answers, "refused": refused, "shared": shared}))
}

// asset serves an embedded file, named by its content for the browser's cache.
func (s *server) asset(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	// The types are named here because on Windows the system's may be anything.
	kind := map[string]string{".css": "text/css; charset=utf-8",
		".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}[path.Ext(name)]
	content, err := assets.ReadFile("assets/" + name)
	if err != nil || kind == "" {
		http.NotFound(w, r)
		return
	}
	protect(w.Header())
	w.Header().Set("Content-Type", kind)
	w.Header().Set("ETag", fmt.Sprintf(`"%.8x"`, sha256.Sum256(content)))
	w.Header().Set("Cache-Control", "no-cache")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}

func (s *server) stream(w http.ResponseWriter, r *http.Request) {
	st, ok := s.newStream(w, r)
	if !ok {
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/event-stream; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store, no-transform")
	h.Set("X-Accel-Buffering", "no") // nginx holds answers back otherwise
	if r.Method == http.MethodHead {
		return
	}
	h.Set("Connection", "close") // the end of the answer is the end of the connection
	h.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	s.takeOver(w, st, "200 OK")
}

// newStream reads what a request for events asks for, or answers why it gets none.
func (s *server) newStream(w http.ResponseWriter, r *http.Request) (*stream, bool) {
	if _, ok := s.admit(w, r, false); !ok {
		return nil, false
	}
	query, err := parseForm(r.URL.RawQuery)
	if err != nil {
		http.Error(w, "the query is broken", http.StatusBadRequest)
		return nil, false
	}
	st := &stream{room: s.room, poll: query.Has("wait")}
	st.at.after = cmp.Or(r.Header.Get("Last-Event-ID"), query.Get("after"))
	if st.poll {
		st.wait, err = time.ParseDuration(query.Get("wait"))
	}
	if err != nil || st.wait < 0 {
		http.Error(w, "wait wants 0 or a time such as 25s", http.StatusBadRequest)
		return nil, false
	}
	return st, true
}

// takeOver takes the connection of a request from net/http, whose handler would cost each reader
// five times the memory, and leaves it to one goroutine, which first writes the head of the answer.
// Shutdown waits for the stream from before that on.
func (s *server) takeOver(w http.ResponseWriter, st *stream, status string) {
	select {
	case s.streams <- struct{}{}:
	default:
		s.tellFull()
		w.Header().Set("Connection", "close") // else it stays open, idle, and counts
		unavailable(w, "too many streams")
		return
	}
	conn, came, err := http.NewResponseController(w).Hijack()
	if err != nil {
		<-s.streams
		s.logf("taking over a connection: %v", err)
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetReadBuffer(readBuffer)
	}
	head := bytes.NewBufferString("HTTP/1.1 " + status + "\r\n")
	w.Header().Write(head)
	head.WriteString("\r\n")
	if ws, ok := st.conn.(*webSocket); ok {
		early, _ := came.Peek(came.Reader.Buffered())
		ws.Conn, ws.in, ws.head = conn, io.MultiReader(bytes.NewReader(early), conn), head.Bytes()
	} else {
		st.conn, st.head = conn, head.Bytes()
	}
	release := context.AfterFunc(s.cut, func() { conn.Close() })
	go func() {
		st.run()
		st.conn.Close()
		release()
		s.conns.Add(-1) // net/http does not tell the end of a connection that was taken over
		<-s.streams
	}()
}

// A stream is one reader on its connection. After takeOver only its goroutine has it.
type stream struct {
	room  *room
	conn  net.Conn // the one that net/http had, or a webSocket around it
	head  []byte   // of the answer, until it is written with the first event
	poll  bool     // the answer ends when there was something, or after wait
	wait  time.Duration
	at    cursor
	renew time.Time // when the connection's write deadline is to be set anew
}

// run writes events until the reader is gone, its time is over, or the log is closed. But for a
// WebSocket nothing reads the connection: that the reader is gone shows at a later write. If it
// vanished without a word, that takes as long as the kernel tries to send what it has, in a quiet
// room a quarter of an hour.
func (st *stream) run() {
	end := st.begin()
	waits, greeted := false, false // told to wait; told with a ping that it is up to date
	gap, sent := false, 0          // told a gap; bytes of messages
	for {
		n := st.room.next(&st.at)
		switch {
		case n.unknown && !waits && !n.ended:
			waits, n.frames, n.ping = true, waitFrame, false
			if st.poll {
				end = time.After(max(st.wait, askTimeout))
			}
		case n.gap:
			greeted, gap = false, true // the next ping says that the reader has had it
		default:
			sent += len(n.frames)
		}
		if len(n.frames) > 0 && !st.write(n.frames) {
			return
		}
		switch {
		case st.poll && !n.unknown && st.over(n, gap, sent):
			st.greet("")
			return
		case n.more:
			continue
		case n.ended:
			st.greet(string(retryLine(retryLow, retryHigh)))
			return
		case !n.unknown && !greeted:
			greeted = true
			if !st.greet("") {
				return
			}
		case n.ping && !st.write(pingFrame):
			return
		}
		select {
		case <-n.wake:
		case <-n.settled:
		case <-end:
			st.greet("")
			return
		}
	}
}

// begin puts the line with the time to come back under the head, and returns the channel that tells
// when a poll is over, or the peer of a WebSocket gone; nil, and so never, for a stream.
func (st *stream) begin() (end <-chan time.Time) {
	if ws, ok := st.conn.(*webSocket); ok {
		end = ws.gone
	}
	low, high := retryLow, retryHigh
	if st.poll {
		low, high = pollRetry, pollRetry
		if st.wait = min(st.wait, maxWait); st.wait > 0 {
			low, high = longLow, longHigh
		}
		end = time.After(st.wait)
	}
	st.head = append(st.head, retryLine(low, high)...)
	return end
}

// over tells whether a poll has brought what it is for: what there was when it found its place or
// was told a gap, or if it is a long one any message. Neither goes on for ever in a room that is
// faster than its reader. One that told a gap must come to its ping, or the next one is told again.
func (st *stream) over(n news, gap bool, sent int) bool {
	if st.wait == 0 || gap {
		return st.at.pos >= st.at.goal
	}
	return sent > 0 && !n.more || sent >= maxPoll
}

// greet writes the ping that tells the reader as of which entry it is up to date or, when a poll
// ends early, which one was its last. Until its place is found, the id that it came with may be
// anything, and the ping has none. Before it may come a line in the same block.
func (st *stream) greet(line string) bool {
	id := st.at.after
	if st.at.built == 0 {
		id = ""
	}
	return st.write(append([]byte(line), pingAt(id)...))
}

// write writes to the reader and reports whether it could. A write, which is a block at most, has
// writeTimeout at least; its deadline is set only now and then, because setting one is dear.
func (st *stream) write(b []byte) bool {
	if now := time.Now(); now.After(st.renew) {
		st.renew = now.Add(writeRenew)
		st.conn.SetWriteDeadline(now.Add(writeTimeout + writeRenew))
	}
	if st.head != nil {
		b = append(st.head, b...)
		st.head = nil // the rest of the stream's life may be long
	}
	_, err := st.conn.Write(b)
	return err == nil
}

// A webSocket (RFC 6455) is another way to put a stream on the wire: each event goes out as a text
// message, its bytes the same. And a text message that comes in is a post.
type webSocket struct {
	net.Conn
	in      io.Reader                 // what came with the handshake, then the connection
	head    []byte                    // of the answer, until it is written with the first event
	buffers *sync.Pool                // the server's
	post    func(event string) []byte // returns the reply
	gone    chan time.Time            // closed when nothing more comes from the peer
	awaited atomic.Bool               // there was a ping, and nothing came since

	mu     sync.Mutex // guards closed, and writing
	closed bool       // nothing goes out any more: there was a close frame, or a write broke off
}

const opMore, opText, opBinary, opClose, opPing, opPong = 0, 1, 2, 8, 9, 10 // section 5.2

// What a close frame holds that says why (section 7.4.1).
const (
	goingAway = "\x03\xe9" // 1001: the process ends
	forbidden = "\x03\xea" // 1002: not RFC 6455
	notText   = "\x03\xeb" // 1003
	notUTF8   = "\x03\xef" // 1007
	tooLong   = "\x03\xf1" // 1009
)

// handshake changes to WebSocket, and then answers as stream does. A browser sends its cookies with
// any site's WebSocket, but an Origin too, so that is checked as if this were a POST.
func (s *server) handshake(w http.ResponseWriter, r *http.Request) {
	has := func(name, word string) bool {
		words := strings.ToLower(strings.Join(r.Header[name], " "))
		return slices.Contains(strings.Fields(strings.ReplaceAll(words, ",", " ")), word)
	}
	h, key := w.Header(), r.Header.Get("Sec-Websocket-Key")
	random, err := base64.StdEncoding.DecodeString(key)
	asPost := &http.Request{Method: http.MethodPost, URL: r.URL, Host: r.Host,
		Header: http.Header{"Origin": r.Header["Origin"]}}
	switch {
	case r.Method != http.MethodGet || !r.ProtoAtLeast(1, 1) || !has("Upgrade", "websocket"),
		r.Header.Get("Sec-Websocket-Version") != "13":
		h.Set("Upgrade", "websocket")
		h.Set("Connection", "Upgrade")
		h.Set("Sec-Websocket-Version", "13")
		http.Error(w, "want a WebSocket, version 13", http.StatusUpgradeRequired)
	case err != nil || len(random) != 16 || !has("Connection", "upgrade"):
		why := "want Connection: Upgrade and a Sec-WebSocket-Key of 16 bytes"
		http.Error(w, why, http.StatusBadRequest)
	case s.cfg.origins.Check(asPost) != nil:
		otherSite(w, r)
	default:
		s.upgrade(w, r, key)
	}
}

// upgrade is the rest of handshake. Of the request it keeps the cookies alone, since a whole one
// takes the memory of another reader; they are verified at each post.
func (s *server) upgrade(w http.ResponseWriter, r *http.Request, key string) {
	st, ok := s.newStream(w, r)
	if !ok {
		return
	}
	from, cookies := address(r), http.Header{"Cookie": slices.Clone(r.Header["Cookie"])}
	post := func(event string) []byte {
		sess, who := s.identify(cookies)
		key, text, ok := parsePost(event)
		switch {
		case who == pending:
			return reply(http.StatusServiceUnavailable, cannotTell, soon())
		case who == invalid:
			return reply(http.StatusUnauthorized, "log in first", 0)
		case !ok:
			return reply(http.StatusBadRequest, "want data: lines, and at most one id: line", 0)
		}
		return reply(s.accept(s.cut, sess, from, key, text))
	}
	st.poll, st.conn = false, &webSocket{buffers: &s.buffers, post: post, gone: make(chan time.Time)}
	accept := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	s.takeOver(w, st, "101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Accept: "+base64.StdEncoding.EncodeToString(accept[:]))
}

// parsePost takes a post apart: an event of data: lines and, if it has a key, an id: line.
func parsePost(event string) (key, text string, ok bool) {
	var keys, lines []string
	event = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(event)
	for line := range strings.SplitSeq(strings.TrimRight(event, "\n"), "\n") {
		field, value, colon := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case colon && field == "data":
			lines = append(lines, value)
		case colon && field == "id" && keys == nil:
			keys = append(keys, value)
		default:
			return "", "", false
		}
	}
	return append(keys, rand.Text())[0], strings.Join(lines, "\n"), true
}

// reply is the event that tells the outcome of a post.
func reply(status int, said string, wait time.Duration) []byte {
	what := map[bool]string{true: "id", false: "reason"}[status == http.StatusNoContent]
	text, _ := json.Marshal(said)
	if wait > 0 {
		text = fmt.Appendf(text, `,"retryAfter":%.0f`, math.Ceil(wait.Seconds()))
	}
	return fmt.Appendf(nil, "event: reply\ndata: {\"status\":%d,%q:%s}\n\n", status, what, text)
}

// Write writes the stream's events. With the ping of a silence goes one that the peer's library
// answers. Nothing is heard before the first event is out, so no reply comes before retry:.
func (ws *webSocket) Write(b []byte) (int, error) {
	buffer := ws.buffers.Get().(*[framesSize]byte)
	defer ws.buffers.Put(buffer)
	frames, op := append(buffer[:0], ws.head...), byte(opText)
	for rest := b; len(rest) > 0; {
		end := bytes.IndexByte(rest, '\n') + 1
		for rest[end] != '\n' { // a blank line ends the event
			end += bytes.IndexByte(rest[end:], '\n') + 1
		}
		frames, rest = appendFrame(frames, opText, rest[:end+1]), rest[end+1:]
	}
	if bytes.Equal(b, pingFrame) {
		frames, op = appendFrame(frames, opPing, nil), opPing
	}
	err := ws.put(frames, op)
	if ws.head != nil {
		ws.head = nil
		go ws.listen()
	}
	return len(b), err
}

// put writes whole frames; op is that of the last one. Behind a close frame nothing goes out, but
// the peer may close its side: who closes both at once may destroy what is still on its way.
func (ws *webSocket) put(frames []byte, op byte) error {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.closed {
		return net.ErrClosed
	}
	if op == opPing && !ws.awaited.Swap(true) {
		ws.SetReadDeadline(time.Now().Add(pongTimeout))
	}
	_, err := ws.Conn.Write(frames)
	ws.closed = err != nil || op == opClose
	if err != nil { // perhaps within a frame
		ws.Conn.Close()
	} else if op == opClose {
		ws.awaited.Store(false)
		ws.SetReadDeadline(time.Now().Add(closeTimeout))
		if tcp, ok := ws.Conn.(*net.TCPConn); ok {
			tcp.CloseWrite()
		}
	}
	return err
}

// Close says that the process ends, if nobody has closed, and waits until nothing more comes.
func (ws *webSocket) Close() error {
	ws.put(appendFrame(nil, opClose, []byte(goingAway)), opClose)
	<-ws.gone
	return ws.Conn.Close()
}

// Read reads what the peer sends, who thereby shows that it is there. A ping between the
// two lines may lose its deadline; the next one has it again.
func (ws *webSocket) Read(b []byte) (int, error) {
	n, err := ws.in.Read(b)
	if n > 0 && ws.awaited.Load() {
		ws.SetReadDeadline(time.Time{})
		ws.awaited.Store(false)
	}
	return n, err
}

// listen answers pings, and messages one after the other, until the peer closes or is gone.
func (ws *webSocket) listen() {
	defer close(ws.gone)
	defer ws.Conn.Close()
	var message []byte
	for more := false; ; {
		op, last, data, err := readFrame(ws, maxBody-len(message), more)
		if err != nil {
			return
		}
		if op <= opText {
			message, more = append(message, data...), !last
			if last && !utf8.Valid(message) {
				op, data = opClose, []byte(notUTF8)
			}
		}
		switch { // who cannot be written to is not there to be read from for long
		case op == opPing:
			ws.put(appendFrame(nil, opPong, data), opPong)
		case op == opClose:
			ws.put(appendFrame(nil, opClose, closing(data)), opClose)
			io.Copy(io.Discard, ws.Conn)
			return
		case op <= opText && last:
			ws.put(appendFrame(nil, opText, ws.post(string(message))), opText)
			message = nil
		}
	}
}

// closing returns what to answer a close frame with: the code in it, if there is one and it may be.
func closing(data []byte) []byte {
	var code [2]byte
	copy(code[:], data)
	switch code := int(code[0])<<8 | int(code[1]); {
	case len(data) == 0:
		return nil
	case len(data) == 1, code < 1000, 1004 <= code && code <= 1006, 1015 <= code && code < 3000,
		code > 4999:
		return []byte(forbidden)
	case !utf8.Valid(data[2:]):
		return []byte(notUTF8)
	}
	return code[:]
}

// readFrame reads a client's frame and says whether it is the last of its message, which has room
// for so many bytes; more says that one has begun. What may not be is returned as a close frame
// that says so. Memory is taken for what comes, not for what is announced.
func readFrame(r io.Reader, room int, more bool) (op byte, last bool, data []byte, err error) {
	head := make([]byte, 14)
	if _, err = io.ReadFull(r, head[:2]); err != nil {
		return 0, false, nil, err
	}
	op, last = head[0]&0x7f, head[0]&0x80 != 0 // reserved bits make it an opcode that is none
	size, control := uint64(head[1]&0x7f), op == opClose || op == opPing || op == opPong
	switch {
	case head[1]&0x80 == 0, control && (!last || size > 125),
		!control && (op > opBinary || more != (op == opMore)):
		return opClose, true, []byte(forbidden), nil
	case op == opBinary:
		return opClose, true, []byte(notText), nil
	}
	wide := 0
	if size > 125 {
		wide, size = map[uint64]int{126: 2, 127: 8}[size], 0 // in bytes of its own
	}
	if _, err = io.ReadFull(r, head[2:6+wide]); err != nil {
		return 0, false, nil, err
	}
	for _, b := range head[2 : 2+wide] {
		size = size<<8 | uint64(b)
	}
	switch {
	case wide == 2 && size < 126, wide == 8 && size < 1<<16, size > math.MaxInt64:
		return opClose, true, []byte(forbidden), nil
	case !control && size > uint64(room):
		return opClose, true, []byte(tooLong), nil
	}
	data, err = io.ReadAll(io.LimitReader(r, int64(size)))
	if err == nil && len(data) < int(size) {
		err = io.ErrUnexpectedEOF
	}
	for i := range data {
		data[i] ^= head[2+wide+i%4]
	}
	return op, last, data, err
}

// appendFrame appends a server's frame. No event is over 64 KiB.
func appendFrame(b []byte, op byte, data []byte) []byte {
	if n := len(data); n > 125 {
		b = append(b, 0x80|op, 126, byte(n>>8), byte(n))
	} else {
		b = append(b, 0x80|op, byte(n))
	}
	return append(b, data...)
}

// reconcile agrees on one log. mine is what this process has, list what Redis has, oldest first,
// of which the newest size items are the history and those before them only show which of these are
// second copies. No two of mine have the same key.
//
// The rule: the log is the list. What only mine has goes in behind the entry that it stood behind
// in mine, or in front if there is none; but in front of a full list it was pushed out, and is let
// go. A foreign line stays behind the announced entry that its id names, and goes with it. So of
// the list [a, b, d] and mine [a, c] the log is [a, c, b, d].
//
// forgot says that announced entries went in: Redis had lost them, so the log has to be written
// back, with a gap at its end. It ends, because a write only adds to the list, in an order that
// stays; and it leaves no hole, because an id enters the list once, by a post, or by a write whose
// gap tells every reader.
func reconcile(mine, list []entry, size int) (log []entry, forgot bool) {
	type place struct{ id, behind string } // an entry of the list, and the key behind which to go
	const front = ""
	listed, history := map[string]place{}, []entry(nil)
	for i, e := range list {
		key := keyOf(e.id)
		if _, copied := listed[key]; copied {
			continue
		}
		listed[key] = place{e.id, front}
		if i >= len(list)-size {
			listed[key] = place{e.id, key}
			history = append(history, e)
		}
	}
	added, last := map[string][]entry{}, front // key → what goes in behind it
	for _, e := range mine {
		if same, ok := listed[keyOf(e.id)]; ok {
			last = same.behind
			continue
		}
		behind := last
		base, foreign := e.base()
		if named, ok := listed[keyOf(base)]; foreign && ok {
			if behind = named.behind; named.id != base {
				continue
			}
		}
		if behind != front || len(list) < size {
			added[behind] = append(added[behind], e)
			forgot = forgot || !foreign
		}
	}
	log = added[front]
	for _, e := range history {
		log = append(append(log, e), added[keyOf(e.id)]...)
	}
	return log, forgot
}

// A broker shares the log with other processes through Redis. It keeps two connections: one
// subscribes, one publishes. When anything on them is not as it should be, both are closed and
// the broker joins again, so there is one way back from every fault.
type broker struct {
	url          string
	channel      string
	cookieKey    string // to share; "" until it is known; run's alone
	ownCookieKey bool   // it came from CHAT_KEY and stays out of Redis
	gotKey       func(key string)
	log          *Log
	logf         func(format string, args ...any)

	outgoing chan *attempt
	asking   chan struct{} // gets something when somebody asks for a round trip
	joins    atomic.Uint64 // how often the room was joined
	wrote    atomic.Uint64 // lists written back

	mu     sync.Mutex      // guards all below
	why    error           // why the room is away; nil while it is joined
	since  time.Time       // when it went away
	logged map[string]bool // the reasons that were logged since
	asked  chan struct{}   // the round trip to come; nil while nobody asks for one
	begun  []chan struct{} // those asked for that have begun; closed when one is over
}

// An attempt is an entry on its way to Redis. One message may need several.
type attempt struct {
	entry
	done chan error // gets the outcome of EXEC; buffered: send does not wait for who posts
}

var (
	errNotJoined = errors.New("not joined yet")
	errSilent    = errors.New("what is published does not come back")
	errForgot    = errors.New("the history or the key was forgotten or written anew")
)

func newBroker(cfg *config, l *Log, logf func(string, ...any), gotKey func(string)) *broker {
	return &broker{url: cfg.redis.String(), channel: cfg.channel, log: l, logf: logf,
		cookieKey: cfg.key, ownCookieKey: cfg.key != "", gotKey: gotKey,
		outgoing: make(chan *attempt), asking: make(chan struct{}, 1), why: errNotJoined}
}

// run keeps the room joined until ctx ends. It logs changes of state, not attempts.
//
// While Redis is away posts get 503, readers stay connected and hear pings, and nothing is
// appended. To join again is to agree on the key, subscribe, agree on the list, and see that what
// is published comes back.
func (b *broker) run(ctx context.Context) {
	for {
		err := guarded(func() error { return b.stay(ctx) })
		if ctx.Err() != nil {
			return
		}
		b.setAway(err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(rejoinPause/2 + mathrand.N(rejoinPause)):
		}
	}
}

// guarded runs f. A panic, such as redigo's when an answer has an impossible length, is an error
// like others.
func guarded(f func() error) (err error) {
	defer func() {
		if what := recover(); what != nil {
			err = fmt.Errorf("reading what Redis answers: %v", what)
		}
	}()
	return f()
}

// away returns why the room is away, nil while it is not.
func (b *broker) away() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.why
}

// publish puts the entry into the room and returns the id that its key has when it has come back,
// or why that is not sure.
func (b *broker) publish(ctx context.Context, e entry) (id string, err error) {
	key := keyOf(e.id)
	if id := b.log.idOf(key); id != "" {
		return id, nil
	}
	if why := b.away(); why != nil {
		return "", why
	}
	p := &attempt{e, make(chan error, 1)}
	select {
	case b.outgoing <- p:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	select { // not the log yet, which would wake every post that waits at each one that comes
	case err = <-p.done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	for err == nil {
		added := b.log.addition()
		if id := b.log.idOf(key); id != "" {
			return id, nil
		}
		select {
		case <-added:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	return "", err
}

// stay joins the room and stays until something breaks, and returns what did.
func (b *broker) stay(ctx context.Context) error {
	var following sync.WaitGroup
	defer following.Wait() // the next stay must be the only one to append
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // runs first: closes both connections, which ends follow
	pub, err := b.dial(ctx, redisTimeout)
	if err != nil {
		return err
	}
	sub, err := b.dial(ctx, syncEvery+2*redisTimeout) // a probe of ours must come so often
	if err != nil {
		return err
	}
	if err := b.shareKey(pub); err != nil {
		return err
	}
	if err := b.subscribe(sub); err != nil {
		return err
	}
	f, err := b.takeList(pub)
	if err != nil {
		return err
	}
	broken := make(chan error, 1)
	following.Go(func() { broken <- guarded(func() error { return follow(sub, f) }) })
	return b.tend(pub, f, broken)
}

// dial connects to Redis. The connection is closed when ctx ends, also while it logs in.
func (b *broker) dial(ctx context.Context, patience time.Duration) (redis.Conn, error) {
	netDial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		context.AfterFunc(ctx, func() { c.Close() })
		return timelyConn{c, patience}, nil
	}
	return redis.DialURLContext(ctx, b.url, redis.DialContextFunc(netDial),
		redis.DialTLSHandshakeTimeout(redisTimeout*9/10)) // before a read's, which says less
}

// A timelyConn bounds progress, not the whole: each write may take redisTimeout, and each read must
// bring something within patience. So a history of 64 MB may take its time, and a Redis that stands
// still may not. Redigo's own deadlines, one a reply, would be set much more often, which is dear.
type timelyConn struct {
	net.Conn
	patience time.Duration
}

func (c timelyConn) Write(b []byte) (int, error) {
	c.SetWriteDeadline(time.Now().Add(redisTimeout))
	return c.Conn.Write(b)
}

func (c timelyConn) Read(b []byte) (int, error) {
	c.Conn.SetReadDeadline(time.Now().Add(c.patience))
	return c.Conn.Read(b)
}

// SetReadDeadline does nothing: Read has its own.
func (c timelyConn) SetReadDeadline(time.Time) error { return nil }

// agree returns the value of a string that all processes of the room share and Redis may forget.
// The first one sets it; whoever holds it puts it back. Of two values, one of which was set while
// Redis had forgotten the other, one wins, and the other processes are made to join again.
func (b *broker) agree(
	c redis.Conn, name, mine string, wins func(one, other string) bool) (string, error) {
	if _, err := c.Do("SET", name, mine, "NX"); err != nil {
		return "", err
	}
	found, err := redis.String(c.Do("GET", name))
	if err == redis.ErrNil || err == nil && found == "" {
		err = fmt.Errorf("%s is empty", name)
	}
	if err != nil || found == mine || wins(found, mine) {
		return found, err
	}
	c.Send("SET", name, mine)
	_, err = c.Do("PUBLISH", b.channel+":probe", rewritten+rand.Text())
	return mine, err
}

// shareKey agrees on the key of the cookies. A key begins with the time at which it was drawn: of
// two the older is the room's.
func (b *broker) shareKey(c redis.Conn) error {
	if b.ownCookieKey {
		return nil
	}
	older := func(one, other string) bool { return one < other }
	key, err := b.agree(c, b.channel+":key", cmp.Or(b.cookieKey, drawKey(time.Now())), older)
	if err == nil && key != b.cookieKey {
		b.cookieKey = key
		b.gotKey(key)
	}
	return err
}

// subscribe starts the subscription and returns when Redis has confirmed it.
func (b *broker) subscribe(c redis.Conn) error {
	sub := redis.PubSubConn{Conn: c}
	channels := []any{b.channel, b.channel + ":id", b.channel + ":probe"}
	if err := sub.Subscribe(channels...); err != nil {
		return err
	}
	for range channels {
		if err, bad := sub.Receive().(error); bad {
			return err
		}
	}
	return nil
}

// commit runs a transaction that was sent but for its EXEC, and returns the replies inside of it.
func commit(c redis.Conn) ([]any, error) {
	c.Send("EXEC")
	replies, err := redis.Values(c.Do("")) // to all that was sent
	if err != nil {
		return nil, err
	}
	return results(replies)
}

// results takes the replies to MULTI, the commands and EXEC, and returns those inside of the EXEC.
// An error among any counts as the whole's: Redis runs the other commands all the same, and that of
// a command says more than that EXEC discarded it. It is redis.ErrNil when a WATCH made EXEC do
// nothing.
func results(replies []any) ([]any, error) {
	want := len(replies) - 2
	inside, err := redis.Values(replies[want+1], nil)
	for _, r := range slices.Concat(replies, inside) {
		if e, bad := r.(redis.Error); bad {
			return nil, e
		}
	}
	if err == nil && len(inside) != want {
		err = fmt.Errorf("a transaction of %d commands has %d answers", want, len(inside))
	}
	return inside, err
}

// parseList reads the list's items, and counts all of them. What is not "<id> <line>" is not ours
// and is left out.
func parseList(reply any, err error) (list []entry, items int, _ error) {
	raw, err := redis.ByteSlices(reply, err)
	for _, item := range raw {
		id, text, _ := strings.Cut(string(item), " ")
		if line := fromRedis(text); announcedID(id) && !blank(line) {
			list = append(list, entry{strings.Clone(id), strings.Clone(line)}) // not the item
		}
	}
	return list, len(raw), err
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

// takeList makes the list the log. The seam between list and subscription is a probe, published in
// the same transaction in which the list is read: what the subscription brings before it is in the
// list or older. The list is read on the other connection, because Redis ends a subscriber to whom
// it owes over 32 MB, or over 8 MB for a minute, and a list can be 64 MB.
//
// A probe serves once: one of an earlier try would be taken for the seam, and what came between the
// two put behind what is newer.
func (b *broker) takeList(c redis.Conn) (*feed, error) {
	for range restoreTries {
		f := newFeed(b.log, b.channel)
		b.depart()
		c.Send("MULTI")
		c.Send("LRANGE", b.channel+":history", 0, -1)
		c.Send("PUBLISH", b.channel+":probe", f.probe)
		c.Send("GET", b.channel+":key") // a cluster says so at once if it is in another slot
		replies, err := commit(c)
		if err != nil {
			return nil, err
		}
		list, items, err := parseList(replies[0], nil)
		if err != nil {
			return nil, err
		}
		log, anew := f.merge(list)
		if anew == nil {
			f.begin(log, f.probe, items, len(list) >= f.log.size)
			return f, nil
		}
		if err = b.writeList(c, f); err != redis.ErrNil {
			return f, err
		}
	}
	return nil, errors.New("the history is being rewritten by others")
}

// writeList writes back what Redis forgot. Every other process joins again then, for some of it may
// be new to it. It returns redis.ErrNil when the list has changed meanwhile: then nothing is
// written.
func (b *broker) writeList(c redis.Conn, f *feed) error {
	name := b.channel + ":history"
	if _, err := c.Do("WATCH", name); err != nil {
		return err
	}
	list, _, err := parseList(c.Do("LRANGE", name, 0, -1))
	if err != nil {
		return err
	}
	log, items := f.merge(list)
	if items == nil {
		c.Do("UNWATCH")
		return redis.ErrNil
	}
	b.depart()
	c.Send("MULTI")
	c.Send("DEL", name)
	for _, e := range items {
		c.Send("RPUSH", name, e.id+" "+toRedis(e.line))
	}
	c.Send("PUBLISH", b.channel+":probe", rewritten+f.probe)
	if _, err = commit(c); err == nil {
		f.begin(log, rewritten+f.probe, len(items), false)
		b.wrote.Add(1)
		b.logf("redis had forgotten; the history was written back, %d messages", len(items))
	}
	return err
}

// rewritten, on the probe channel before a probe of the process that did it, says that the list or
// the key was written back.
const rewritten = "rewritten "

// A feed takes in what Redis brings during one stay: first the list, then the subscription. From
// then on it belongs to the goroutine of follow, but for echo and length, and renew, which is tend's.
type feed struct {
	log     *Log
	channel string
	probe   string        // a random word that this process publishes to hear it come back
	seam    string        // what comes before it is in the list or older; "" when it has come
	echo    chan struct{} // gets something when the probe has come back
	length  atomic.Int64  // items that the list has at least, while Redis forgets nothing
	renew   time.Time     // when Redis is to be told again how long to keep the room

	id string // announces the next line

	// Foreign lines are numbered since the announced entry before them.
	base   string // id of that entry, "0" before the first
	number int
}

// listSize is how many items the list keeps for a history of so many: behind them second copies
// show, whose first is older.
func listSize(history int) int { return history + history/8 }

func newFeed(l *Log, channel string) *feed {
	return &feed{log: l, channel: channel, probe: rand.Text(), echo: make(chan struct{}, 1)}
}

// merge returns what the log is with this list and, if Redis had forgotten something of it, what the
// list is to be: the newest that were announced, with a gap at the end; else nil.
func (f *feed) merge(list []entry) (log, items []entry) {
	log, forgot := reconcile(f.log.entries(), list, f.log.size)
	if !forgot {
		return log, nil
	}
	log = append(log, entry{newID(rand.Text()), gapLine})
	for _, e := range log {
		if _, foreign := e.base(); !foreign {
			items = append(items, e)
		}
	}
	return log, items[max(0, len(items)-f.log.size):]
}

// begin makes these entries the log, and lets the subscription continue it behind the seam.
func (f *feed) begin(log []entry, seam string, items int, older bool) {
	f.seam, f.base, f.number = seam, "0", 0
	f.length.Store(int64(items))
	for _, e := range log {
		if _, foreign := e.base(); !foreign {
			f.base = e.id
		}
	}
	f.log.rebuild(log, older)
}

// least returns how many items the list must have when a command that is sent now is run.
func (f *feed) least() int64 { return min(f.length.Load(), int64(listSize(f.log.size))) }

// follow hands on what the subscription brings, and returns when it breaks.
func follow(sub redis.Conn, f *feed) error {
	for {
		switch m := (redis.PubSubConn{Conn: sub}).Receive().(type) {
		case error:
			return m
		case redis.Message:
			if err := f.hear(m.Channel, string(m.Data)); err != nil {
				return err
			}
		}
	}
}

// hear takes in what came on a channel. Redis lets nothing come between the commands of one EXEC,
// so the id before a line is the line's. It returns errForgot when another process has written
// the list anew.
func (f *feed) hear(channel, text string) error {
	switch {
	case channel == f.channel+":probe" && text == cmp.Or(f.seam, f.probe):
		f.seam = ""
		select {
		case f.echo <- struct{}{}:
		default: // somebody else published it
		}
	case f.seam != "":
	case channel == f.channel+":probe":
		if strings.HasPrefix(text, rewritten) {
			return errForgot
		}
	case channel == f.channel+":id":
		if announcedID(text) {
			f.id = text
		}
	case channel == f.channel:
		f.receive(text)
	}
	return nil
}

// receive appends a line, under the id that announced it or one derived from that. An announced
// line that begins like an act is ignored: acts do not come on this channel.
func (f *feed) receive(raw string) {
	id, line := f.id, fromRedis(raw)
	f.id = ""
	if id != "" {
		f.length.Add(1)
	}
	switch {
	case blank(line) || id != "" && strings.HasPrefix(line, "!"):
	case id == "":
		f.log.append(entry{f.foreignID(raw), line})
	default:
		if _, added := f.log.append(entry{id, line}); added { // a copy changes nothing
			f.base, f.number = id, 0
		}
	}
}

// foreignID returns the id of a line that no id announced: the announced one before it, a dot,
// and a hash of the line and of its number since. Every process that heard the same since derives
// the same.
func (f *feed) foreignID(raw string) string {
	for {
		f.number++
		hash := sha256.Sum256(fmt.Appendf(nil, "%d %s", f.number, raw))
		for i := range hash {
			hash[i] = 'a' + hash[i]%26
		}
		id := f.base + "." + string(hash[:8])
		if f.log.idOf(id) == "" {
			return id
		}
	}
}

// tend publishes posts and sends the probe on its round trips, until something breaks: every
// syncEvery, and when somebody asks for an id that is not known. Only one is under way at a time.
// The first one, which went out with the list, makes the room joined.
func (b *broker) tend(pub redis.Conn, f *feed, broken <-chan error) error {
	timer := time.NewTimer(joinTimeout) // while the probe is under way until it must be back, else
	defer timer.Stop()                  // until it goes out
	underWay := true
	for {
		asking := b.asking
		if underWay {
			asking = nil
		}
		select {
		case err := <-broken:
			return err
		case p := <-b.outgoing:
			if err := b.send(pub, f, b.batch(p)); err != nil {
				return err
			}
			continue
		case <-f.echo:
			underWay = false
			b.arrive()
			b.setJoined()
			timer.Reset(syncEvery)
			continue
		case <-timer.C:
			if underWay && len(f.echo) == 0 {
				return errSilent
			}
		case <-asking:
		}
		if !underWay {
			if err := b.sync(pub, f); err != nil {
				return err
			}
			underWay = true
			timer.Reset(syncTimeout)
		}
	}
}

// sync sends the probe on a round trip. That it comes back shows that the subscription lives, and
// that all is here that was published before; that it can be sent, that Redis takes writes. The
// list's length and the key show that Redis forgot. Sent also in a busy room: what looks idle on
// one connection, a proxy may end. What nobody uses any more expires in Redis; now and then it is
// told that somebody does.
func (b *broker) sync(c redis.Conn, f *feed) error {
	least := f.least()
	b.depart()
	c.Send("MULTI")
	c.Send("LTRIM", b.channel+":history", -listSize(f.log.size), -1)
	c.Send("LLEN", b.channel+":history")
	c.Send("GET", b.channel+":key")
	c.Send("PUBLISH", b.channel+":probe", f.probe)
	now := time.Now()
	if now.After(f.renew) {
		c.Send("EXPIRE", b.channel+":key", int(keptFor.Seconds()))
		c.Send("EXPIRE", b.channel+":history", int(keptFor.Seconds()))
	}
	replies, err := commit(c)
	if err != nil {
		return err
	}
	if set, _ := replies[len(replies)-1].(int64); now.After(f.renew) && set == 1 { // there is a list
		f.renew = now.Add(keptRenew)
	}
	length, _ := replies[1].(int64)
	key, _ := replies[2].([]byte)
	if length < least || !b.ownCookieKey && string(key) != b.cookieKey {
		return errForgot
	}
	return nil
}

// ask returns what is closed when a round trip through Redis that begins after now is over. Who ask
// together share one.
func (b *broker) ask() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.asked == nil {
		b.asked = make(chan struct{})
		select {
		case b.asking <- struct{}{}:
		default:
		}
	}
	return b.asked
}

// depart says that a round trip begins. If the stay ends before it is over, the next one counts.
func (b *broker) depart() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.asked != nil {
		b.begun, b.asked = append(b.begun, b.asked), nil
	}
}

// arrive says that it is over: all that anybody can have heard of before it began is here.
func (b *broker) arrive() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, trip := range b.begun {
		close(trip)
	}
	b.begun = nil
}

// batch returns the attempt and others that already wait.
func (b *broker) batch(p *attempt) []*attempt {
	batch := []*attempt{p}
	for len(batch) < batchSize {
		select {
		case p = <-b.outgoing:
			batch = append(batch, p)
		default:
			return batch
		}
	}
	return batch
}

// send publishes a batch in one round trip, each post a transaction of its own, and tells each
// how it went. On an error the stay is over.
func (b *broker) send(c redis.Conn, f *feed, batch []*attempt) (err error) {
	defer func() {
		for _, p := range batch {
			p.done <- err
		}
	}()
	least := f.least()
	list := b.channel + ":history"
	for _, p := range batch {
		line := toRedis(p.line)
		c.Send("MULTI")
		c.Send("RPUSH", list, p.id+" "+line)
		c.Send("LTRIM", list, -listSize(f.log.size), -1)
		c.Send("PUBLISH", b.channel+":id", p.id)
		c.Send("PUBLISH", b.channel, line)
		c.Send("EXEC")
	}
	replies, err := redis.Values(c.Do(""))
	if err != nil {
		return err
	}
	for one := range slices.Chunk(replies, 6) {
		inside, bad := results(one)
		if bad != nil {
			return bad
		}
		if length, _ := inside[0].(int64); length <= least {
			err = errForgot // but this post is in the room
		}
		batch[0].done <- nil
		batch = batch[1:]
	}
	return err
}

// setAway notes why the room is away, and says so, each reason once until it is joined again.
func (b *broker) setAway(why error) {
	b.mu.Lock()
	words, state, hint := inWords(why), "still away", ""
	if b.logged == nil {
		b.since, b.logged = time.Now(), map[string]bool{}
		state = "away, trying again until it answers"
		switch op, network := errors.AsType[*net.OpError](why); {
		case b.why != errNotJoined:
		case network && op.Op == "dial" && op.Addr != nil && !op.Timeout():
			hint = "; start it, or leave -redis out for a room in memory"
		case words == hungUp:
			hint = "; perhaps TLS is on one side only"
		}
	}
	known := b.logged[words]
	b.why, b.logged[words] = why, true
	b.mu.Unlock()
	if !known {
		b.logf("redis is %s: %s%s", state, words, hint)
	}
}

// setJoined notes that messages flow.
func (b *broker) setJoined() {
	b.mu.Lock()
	was, after := b.why, ""
	if b.logged != nil {
		after = fmt.Sprintf(" after %v", time.Since(b.since).Round(100*time.Millisecond))
	}
	b.why, b.logged = nil, nil
	if was != nil {
		b.joins.Add(1)
	}
	b.mu.Unlock()
	if was != nil {
		held, _, _ := b.log.numbers()
		b.logf("redis is joined%s, %d messages held", after, held)
	}
}

const hungUp = "it has ended the connection"

// inWords is an error for the log. What a server says is quoted, cut, and without the arguments
// that it may repeat, such as a password or a message.
func inWords(err error) string {
	said, _ := errors.AsType[redis.Error](err)
	text, _, _ := strings.Cut(string(said), ", with args")
	kind, _, _ := strings.Cut(text, " ")
	_, wrongTLS := errors.AsType[tls.RecordHeaderError](err)
	op, network := errors.AsType[*net.OpError](err)
	connected := network && op.Source != nil
	name, unresolved := errors.AsType[*net.DNSError](err)
	switch {
	case slices.Contains([]string{"MOVED", "CLUSTERDOWN", "CROSSSLOT"}, kind):
		return fmt.Sprintf("this Redis is a cluster: name the node that has the room, "+
			"whose keys -channel '{chat}' keeps together: %.200q", text)
	case strings.Contains(text, "unknown command"):
		return fmt.Sprintf("this is a Sentinel, or a Redis without a command that a room needs; "+
			"name the master, or a proxy that follows it: %.200q", text)
	case text != "":
		return fmt.Sprintf("%.200q", text)
	case wrongTLS:
		return "this port speaks no TLS: it wants redis://"
	case strings.HasPrefix(err.Error(), "redigo: "):
		return "that is not Redis, or it wants rediss://"
	case connected && op.Timeout():
		return "it does not answer"
	case connected, errors.Is(err, io.EOF):
		return hungUp
	case unresolved && !name.IsNotFound: // whose words have a port, another one each time
		return fmt.Sprintf("no name server answers for %q", name.Name)
	}
	text, _, _ = strings.Cut(err.Error(), ": current time ") // with a certificate that has expired
	return text
}
