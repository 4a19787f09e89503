package main

/*
The tests, in the order of this file, and what of README.md's promises each part shows.

	harness    programs that a test runs, a client, and what reads a stream as a page does
	log        a reader that comes back gets exactly what it missed, or is told a gap
	stream     the same over time; polls; a reader that stops; the end in under a second
	pure       texts, names, cookies, limits; fuzz of what reaches a page
	http       every request and its answer, in tables; limits; no input harms anybody else
	redis      the contract with other programs; what is in the list; who knows an id; start and usage
	faults     204 is in the room, once, in one order, whatever Redis and the network do
	hosting    Redis by name, behind TLS, with few rights, in a cluster, failing over (CHAT_TEST_REDIS=valkey-server)
	model      reconcile, in a table; and all of the agreement with a Redis of a few lines, by seeds (CHAT_MODEL, CHAT_SEED)
	mixed      all faults at once over real HTTP (CHAT_MIXED=10m, CHAT_SEED)
	readers    what one costs who reads slowly, or not, or leaves, through a WebSocket too; descriptors
	pages      in a real browser: the chat page, the lesson
	websocket  RFC 6455 over raw sockets; fuzz; Python, Chromium, nginx and Caddy
	documents  README's lines are run: shell, nginx, Caddy, systemd; manual, flags and numbers agree
	benchmarks

A check says what must be so: same compares, expect goes on where it fails, require does not.

Most tests run beside each other, those in a browser too. What measures, or moves tens of megabytes,
runs alone.

go test -short is the quick look. It leaves out what takes long by its nature.
*/

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
)

// patience is how long a test waits for what must happen: ten times what it takes, or more.
const patience = time.Minute

// eventually waits until ok, for what offers no channel to wait on.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	within(t, patience, what, ok)
}

// within is eventually with a limit of its own.
func within(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		require(t, time.Since(start) <= limit, "waited %v for %s", limit, what)
	}
}

// same fails unless got is want. The words say of what; one empty list is the same as another.
func same[T any](t testing.TB, got, want T, what string, args ...any) {
	t.Helper()
	if a, b := reflect.ValueOf(got), reflect.ValueOf(want); reflect.DeepEqual(got, want) ||
		a.Kind() == reflect.Slice && a.Len() == 0 && b.Len() == 0 {
		return
	}
	verb := "%+v"
	switch any(got).(type) {
	case string, []string:
		verb = "%q"
	}
	t.Errorf("%s: got %.4000s, want %.4000s", fmt.Sprintf(what, args...), fmt.Sprintf(verb, got), fmt.Sprintf(verb, want))
}

// expect fails unless ok, in these words.
func expect(t testing.TB, ok bool, format string, args ...any) {
	t.Helper()
	if !ok {
		t.Errorf(format, args...)
	}
}

// require is expect for what the rest of a test stands on: it ends the test.
func require(t testing.TB, ok bool, format string, args ...any) {
	t.Helper()
	if !ok {
		t.Fatalf(format, args...)
	}
}

// must ends the test if there is an error.
func must(t testing.TB, err error) {
	t.Helper()
	require(t, err == nil, "%v", err)
}

// need returns the path of a program that a test runs. Without it the test is skipped, or
// fails where nothing may be skipped, with CI=true.
func need(t testing.TB, program, install string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil && os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing: %s", program, install)
	} else if err != nil {
		t.Skipf("%s is missing: %s", program, install)
	}
	return path
}

// An output collects what a program prints.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// A program is chat, in this process (startRoom) or in one of its own (startProcess), or another one
// that a test needs (launch).
type program struct {
	t           testing.TB
	url         string
	out, log    output // its standard output and standard error
	interrupt   context.CancelFunc
	ended       chan struct{} // closed when it has
	err         error         // how it ended
	*os.Process               // nil in this process
}

func newProgram(t testing.TB, name string) *program {
	p := &program{t: t, ended: make(chan struct{})}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s %s printed:\n%s%s", name, p.url, p.out.String(), p.log.String())
		}
	})
	return p
}

// launch runs a program until the test ends.
func launch(t testing.TB, cmd *exec.Cmd) *program {
	t.Helper()
	p := newProgram(t, filepath.Base(cmd.Path))
	cmd.Stdout, cmd.Stderr = &p.out, &p.log
	must(t, cmd.Start())
	go func() {
		defer close(p.ended)
		p.err = cmd.Wait()
	}()
	p.Process, p.interrupt = cmd.Process, func() {
		if cmd.Process.Signal(os.Interrupt) != nil { // Windows has none
			cmd.Process.Kill()
		}
	}
	t.Cleanup(p.kill)
	return p
}

// succeeds runs a program to its end.
func succeeds(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	expect(t, err == nil, "%v: %v\n%s", cmd, err, out)
}

// comesUp waits until ok, and returns false if the program ended before.
func (p *program) comesUp(ok func() bool) (up bool) {
	p.t.Helper()
	eventually(p.t, "a program to come up", func() bool {
		select {
		case <-p.ended:
			return true
		default:
			up = ok()
			return up
		}
	})
	return up
}

// serve launches a server on a free port. Should it end before it listens, somebody may have been
// faster, and it is tried on another one.
func serve(t testing.TB, command func(addr string) *exec.Cmd) (addr string, p *program) {
	t.Helper()
	for range 3 {
		addr = "127.0.0.1:" + freePort(t)
		p = launch(t, command(addr))
		if p.comesUp(func() bool { return listens(addr) }) {
			return addr, p
		}
	}
	t.Fatalf("it ended three times before it listened: %v", p.err)
	return "", nil
}

func listens(addr string) bool {
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

var handedOut sync.Map // port → true

// freePort picks a port that no other test gets, below those that outgoing connections get: while
// Redis is down, a dial to one of those can meet itself, and then Redis finds its port taken.
func freePort(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(20000 + rand.IntN(12000))
		if _, taken := handedOut.LoadOrStore(port, true); taken {
			continue
		}
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

// stop interrupts the program and returns how it ended.
func (p *program) stop() error {
	p.interrupt()
	return p.wait(patience)
}

// wait returns how the program ended, which it must within limit.
func (p *program) wait(limit time.Duration) error {
	select {
	case <-p.ended:
		return p.err
	case <-time.After(limit):
		p.t.Errorf("the program still runs after %v", limit)
		return errors.New("still running")
	}
}

// kill is SIGKILL, for a program in a process of its own.
func (p *program) kill() {
	p.Process.Kill()
	p.wait(patience)
}

// signal uses kill(1): not every platform's package syscall has Kill.
func (p *program) signal(name string) {
	p.t.Helper()
	kill := need(p.t, "kill", "part of every Unix")
	out, err := exec.Command(kill, "-"+name, strconv.Itoa(p.Pid)).CombinedOutput()
	require(p.t, err == nil, "kill -%s %d: %v: %s", name, p.Pid, err, out)
}

var (
	openAt     = regexp.MustCompile(`^.*http://[^/\s]+:(\d+).*\n`)
	assignment = regexp.MustCompile(`^[A-Z_]+=`)
)

// startRoom opens a room in this process, on a free port and without a rate limit unless args
// say otherwise. As with env(1), an argument NAME=value is its environment.
func startRoom(t testing.TB, args ...string) *program {
	t.Helper()
	env, args := splitArgs(args)
	p := newProgram(t, "the room")
	ctx, cancel := context.WithCancel(context.Background())
	p.interrupt = cancel
	go func() {
		defer close(p.ended)
		p.err = run(ctx, args, environ(env...), &p.out, &p.log)
	}()
	return p.opened()
}

// environ is a getenv of these, NAME=value.
func environ(env ...string) func(name string) string {
	return func(name string) string {
		for _, e := range slices.Backward(env) {
			if value, ok := strings.CutPrefix(e, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

// startProcess is startRoom with the built binary.
func startProcess(t testing.TB, args ...string) *program {
	t.Helper()
	return startCommand(t, args, buildBinary(t))
}

// startLimited is startProcess after a shell command, such as "ulimit -n 120".
func startLimited(t testing.TB, limit string, args ...string) *program {
	t.Helper()
	return startCommand(t, args, need(t, "sh", "part of every Unix"), "-c", limit+`; exec "$0" "$@"`, buildBinary(t))
}

func startCommand(t testing.TB, args []string, command ...string) *program {
	t.Helper()
	env, args := splitArgs(args)
	cmd := exec.Command(command[0], append(command[1:], args...)...)
	cmd.Env = append(env, "PATH="+os.Getenv("PATH"))
	return launch(t, cmd).opened()
}

func splitArgs(args []string) (env, flags []string) {
	flags = []string{"-addr", "127.0.0.1:0", "-rate", "0"}
	for _, arg := range args {
		if assignment.MatchString(arg) {
			env = append(env, arg)
		} else {
			flags = append(flags, arg)
		}
	}
	return env, flags
}

// opened takes the room's address from the first line that it prints.
func (p *program) opened() *program {
	p.t.Helper()
	p.t.Cleanup(func() { p.stop() })
	if !p.comesUp(func() bool {
		found := openAt.FindStringSubmatch(p.out.String())
		if found != nil {
			p.url = "http://127.0.0.1:" + found[1]
		}
		return found != nil
	}) {
		p.t.Fatalf("the room ended before it opened: %v", p.err)
	}
	return p
}

// joined waits until the room says that it can be used.
func (p *program) joined() *program {
	p.t.Helper()
	eventually(p.t, "/healthz to be 200", newClient(p.t, p.url).healthy)
	return p
}

// changes is what the room logged about Redis, a word for each line; any other line stands as it is,
// and so does a reason of being away that was told before.
func (p *program) changes() (all []string) {
	reasons := map[string]bool{}
	for line := range strings.Lines(p.log.String()) {
		_, reason, still := strings.Cut(line, "redis is still away: ")
		switch {
		case still && !reasons[reason]:
			reasons[reason] = true
			continue
		case strings.Contains(line, "redis is joined"):
			line = "joined"
			clear(reasons)
		case strings.Contains(line, "redis is away"):
			line = "away"
		case strings.Contains(line, "redis had forgotten"):
			line = "wrote"
		case strings.Contains(line, " full: "): // is counted where it matters
			continue
		}
		all = append(all, line)
	}
	return all
}

// changed fails unless the room logged just this.
func (p *program) changed(want ...string) {
	p.t.Helper()
	same(p.t, p.changes(), want, "it logged")
}

var (
	binaryDir string // removed by TestMain
	binary    = sync.OnceValues(func() (path string, err error) {
		if binaryDir, err = os.MkdirTemp("", "chat-test-"); err != nil {
			return "", err
		}
		path = filepath.Join(binaryDir, "chat.exe")
		if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
			return "", fmt.Errorf("go build: %v\n%s", err, out)
		}
		return path, nil
	})
)

// buildBinary builds the program, once per run of the tests.
func buildBinary(t testing.TB) string {
	t.Helper()
	need(t, "go", "https://go.dev/dl")
	path, err := binary()
	must(t, err)
	return path
}

func TestMain(m *testing.M) {
	if addr := os.Getenv("CHAT_TEST_LOOP"); addr != "" { // this process is a server of BenchmarkBeside
		panic(http.ListenAndServe(addr, new(loop)))
	}
	flag.Set("test.parallel", "8") // they wait more than they work; the command line may say otherwise
	code := m.Run()
	endBrowsers()
	if binaryDir != "" {
		os.RemoveAll(binaryDir)
	}
	os.Exit(code)
}

// redisProgram is the server that tests start: redis-server, or CHAT_TEST_REDIS=valkey-server.
var redisProgram = cmp.Or(os.Getenv("CHAT_TEST_REDIS"), "redis-server")

// A redisServer is a redis-server of the test's own. It keeps its port and its directory
// from one start to the next.
type redisServer struct {
	*program // of the last start
	t        testing.TB
	addr     string
	dir      string // with its data
	password string
	args     []string
}

// startRedis starts one that keeps nothing on disk, unless args say otherwise.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	r := newRedis(t, args...)
	if !r.tryStart() { // somebody may have taken the port
		r = newRedis(t, args...)
		r.start()
	}
	return r
}

// newRedis is a redisServer that is not started yet.
func newRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	need(t, redisProgram, "apt-get install "+redisProgram)
	port := freePort(t)
	r := &redisServer{t: t, addr: "127.0.0.1:" + port, dir: t.TempDir()}
	r.args = append([]string{"--port", port, "--bind", "127.0.0.1", "--dir", r.dir, "--save", "", "--appendonly", "no"}, args...)
	if i := slices.Index(args, "--requirepass"); i >= 0 {
		r.password = args[i+1]
	}
	return r
}

func (r *redisServer) start() {
	r.t.Helper()
	require(r.t, r.tryStart(), "%s ended: %v", redisProgram, r.err)
}

func (r *redisServer) tryStart() bool {
	r.t.Helper()
	r.program = launch(r.t, exec.Command(redisProgram, r.args...))
	return r.comesUp(func() bool {
		_, err := r.try("PING")
		return err == nil
	})
}

// try runs one command on a connection of its own.
func (r *redisServer) try(command string, args ...any) (any, error) {
	c, err := redis.Dial("tcp", r.addr, redis.DialPassword(r.password),
		redis.DialConnectTimeout(patience), redis.DialReadTimeout(patience), redis.DialWriteTimeout(patience))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Do(command, args...)
}

// do is try for what must succeed.
func (r *redisServer) do(command string, args ...any) any {
	r.t.Helper()
	reply, err := r.try(command, args...)
	require(r.t, err == nil, "redis: %s %.80q: %v", command, args, err)
	return reply
}

// room is startRoom on this Redis, once it has joined.
func (r *redisServer) room(args ...string) *program {
	r.t.Helper()
	return startRoom(r.t, append([]string{"-redis", r.addr}, args...)...).joined()
}

// cut ends the connections of the rooms.
func (r *redisServer) cut() {
	r.t.Helper()
	r.do("CLIENT", "KILL", "TYPE", "pubsub")
	r.do("CLIENT", "KILL", "TYPE", "normal")
}

// lock sets a password; who is in stays in.
func (r *redisServer) lock(password string) {
	r.t.Helper()
	r.do("CONFIG", "SET", "requirepass", password)
	r.password = password
}

// unread counts the connections on which Redis, while it is stopped, was sent something.
func (r *redisServer) unread() (n int) {
	r.t.Helper()
	for _, s := range sockets(r.t, r.addr) {
		if s.unread > 1 { // the end of a connection counts as one byte
			n++
		}
	}
	return n
}

// get is the value of a string, "" if there is none.
func (r *redisServer) get(name string) string {
	r.t.Helper()
	value, _ := redis.String(r.do("GET", name), nil)
	return value
}

// history is the list as redis-cli shows it.
func (r *redisServer) history() []string {
	r.t.Helper()
	list, err := redis.Strings(r.do("LRANGE", "chat:history", 0, -1), nil)
	must(r.t, err)
	return list
}

// texts is the list without ids and times; a gap is "(gap)".
func (r *redisServer) texts() (all []string) {
	r.t.Helper()
	for _, item := range r.history() {
		id, line, _ := strings.Cut(item, " ")
		if line == gapLine && drawnID.MatchString(id) {
			line = "(gap)"
		}
		all = append(all, event{data: line}.text())
	}
	return all
}

// fill puts n messages into the list, each its number and a text, 1 the oldest.
func (r *redisServer) fill(n int, text string) {
	r.t.Helper()
	r.do("EVAL", `for i = 1, ARGV[1] do
		redis.call("RPUSH", KEYS[1], string.format("drawn-by-the-test-%04d~aaaaaaaa [12:00:00] x: %d%s", i, i, ARGV[2]))
	end`, 1, "chat:history", n, text)
}

// announce has n messages come, numbered from 1, as from another process.
func (r *redisServer) announce(n int) {
	r.t.Helper()
	r.do("EVAL", `for i = 1, ARGV[1] do
		local id, line = string.format("announced-by-the-test-%04d~aaaaaaaa", i), "[12:00:00] x: " .. i
		redis.call("RPUSH", "chat:history", id .. " " .. line)
		redis.call("PUBLISH", "chat:id", id)
		redis.call("PUBLISH", "chat", line)
	end`, 0, n)
}

// listen collects what arrives on the channels, each message as "channel payload".
func (r *redisServer) listen(channels ...any) <-chan string {
	r.t.Helper()
	c, err := redis.Dial("tcp", r.addr, redis.DialPassword(r.password), redis.DialConnectTimeout(patience))
	must(r.t, err)
	r.t.Cleanup(func() { c.Close() })
	sub := redis.PubSubConn{Conn: c}
	must(r.t, sub.Subscribe(channels...))
	for range channels {
		sub.Receive() // the acknowledgement
	}
	heard := make(chan string, 1000)
	go func() {
		defer close(heard)
		for {
			switch m := sub.Receive().(type) {
			case redis.Message:
				heard <- m.Channel + " " + string(m.Data)
			case error:
				return
			}
		}
	}()
	return heard
}

// next is what arrives next, within patience.
func next(t testing.TB, heard <-chan string) string {
	t.Helper()
	select {
	case got := <-heard:
		return got
	case <-time.After(patience):
		t.Fatalf("nothing within %v", patience)
		return ""
	}
}

// A client is a person with a browser: it keeps cookies and follows no redirect.
type client struct {
	t    testing.TB
	url  string
	http *http.Client
}

func newClient(t testing.TB, url string) *client {
	jar, _ := cookiejar.New(nil)
	transport := &http.Transport{DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &client{t, url, &http.Client{
		Jar:           jar,
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// at is the same person, with the same cookies, at another process of the room.
func (c *client) at(url string) *client { return &client{c.t, url, c.http} }

type response struct {
	status int // 0 when the connection ended without an answer
	header http.Header
	body   string
}

// retryAfter tells whether the answer says after how many seconds to come back.
func (r response) retryAfter() bool { return onlySeconds.MatchString(r.header.Get("Retry-After")) }

var onlySeconds = regexp.MustCompile(`^[1-9]\d*$`)

// send makes a request with headers "Name: value" and returns the answer with its body unread.
// A body is a form unless a header says otherwise.
func (c *client) send(ctx context.Context, method, path, body string, headers ...string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ":")
		req.Header.Add(name, strings.TrimPrefix(value, " "))
	}
	if method == http.MethodPost && req.Header["Content-Type"] == nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	req.Host = req.Header.Get("Host") // empty means that of the URL
	return c.http.Do(req)
}

// try is send for an answer that ends; without one the status is 0.
func (c *client) try(method, path, body string, headers ...string) (response, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := c.send(ctx, method, path, body, headers...)
	if err != nil {
		return response{}, err
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	return response{resp.StatusCode, resp.Header, string(all)}, err
}

// do is try for what must be answered.
func (c *client) do(method, path, body string, headers ...string) response {
	c.t.Helper()
	got, err := c.try(method, path, body, headers...)
	require(c.t, err == nil, "%s %s: %v", method, path, err)
	return got
}

// get is do without a body.
func (c *client) get(path string, headers ...string) response {
	c.t.Helper()
	return c.do(http.MethodGet, path, "", headers...)
}

// healthy tells what /healthz says.
func (c *client) healthy() bool { return c.get("/healthz").status == http.StatusOK }

// form encodes name, value, name, value …
func form(pairs ...string) string {
	values := url.Values{}
	for pair := range slices.Chunk(pairs, 2) {
		values.Add(pair[0], pair[1])
	}
	return values.Encode()
}

func (c *client) login(name string) *client {
	c.t.Helper()
	got := c.do("POST", "/login", form("user", name))
	require(c.t, got.status == http.StatusSeeOther, "login as %q: got %d, want 303", name, got.status)
	return c
}

// session is the cookie that the room gave, name and value.
func (c *client) session() *http.Cookie {
	c.t.Helper()
	at, _ := url.Parse(c.url)
	cookies := c.http.Jar.Cookies(at)
	require(c.t, len(cookies) == 1, "got %d cookies, want the session", len(cookies))
	return cookies[0]
}

// cookie is the one that the answer to a post sets, with its attributes.
func (c *client) cookie(path, body string, headers ...string) *http.Cookie {
	c.t.Helper()
	got := (&http.Response{Header: c.do("POST", path, body, headers...).header}).Cookies()
	require(c.t, len(got) == 1, "POST %s sets %d cookies, want 1", path, len(got))
	return got[0]
}

// post says text and returns the status of the answer.
func (c *client) post(text string, headers ...string) int {
	c.t.Helper()
	return c.do("POST", "/post", form("message", text), headers...).status
}

// postKey is post under an Idempotency-Key.
func (c *client) postKey(key, text string) int {
	c.t.Helper()
	return c.post(text, "Idempotency-Key: "+key)
}

// sayAs says text under a key and returns the id that the message has.
func (c *client) sayAs(key, text string) (id string) {
	c.t.Helper()
	got := c.do("POST", "/post", form("message", text), "Idempotency-Key: "+key)
	id = got.header.Get("Message-Id")
	require(c.t, got.status == http.StatusNoContent && strings.HasPrefix(id, key+"~"),
		"posting %.80q as %s: got %d, Message-Id %q, want 204 and an id of that key", text, key, got.status, id)
	return id
}

// say is post for what must be accepted.
func (c *client) say(texts ...string) {
	c.t.Helper()
	for _, text := range texts {
		got := c.post(text)
		require(c.t, got == http.StatusNoContent, "posting %.80q: got %d, want 204", text, got)
	}
}

// sayMany says the numbers from 0 to n, eight at a time, each with a text behind it.
func (c *client) sayMany(n int, text string) {
	c.t.Helper()
	together(8, func(i int) {
		for ; i < n; i += 8 {
			same(c.t, c.post(strconv.Itoa(i)+text), http.StatusNoContent, "message %d", i)
		}
	})
}

// together runs n of them at once, and returns when all have ended.
func together(n int, work func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { work(i) })
	}
	all.Wait()
}

// nameKey makes the Idempotency-Key of a message from its text.
func nameKey(text string) string { return "key-of-message-" + text }

// attempt posts under the key of the text and returns the answer; its status is 0 when there is none.
func (c *client) attempt(text string) response {
	got, _ := c.try("POST", "/post", form("message", text), "Idempotency-Key: "+nameKey(text))
	return got
}

// insist posts under the same key until the room takes it, and returns the id.
func (c *client) insist(text string) (id string) {
	c.t.Helper()
	eventually(c.t, "the room to take "+text, func() bool {
		got := c.attempt(text)
		id = got.header.Get("Message-Id")
		return got.status == http.StatusNoContent
	})
	return id
}

// An answer is an open answer of /stream, read as a page reads it.
type answer struct {
	t      testing.TB
	status int
	header http.Header
	events chan event // closed after the event "end"
	close  context.CancelFunc
}

// stream opens /stream with a query such as "wait=0" and a Last-Event-ID, each if not empty.
func (c *client) stream(query, lastEventID string) *answer {
	c.t.Helper()
	var headers []string
	if lastEventID != "" {
		headers = []string{"Last-Event-ID: " + lastEventID}
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.t.Cleanup(cancel)
	opening := time.AfterFunc(patience, cancel)
	resp, err := c.send(ctx, "GET", "/stream?"+query, "", headers...)
	require(c.t, err == nil, "opening the stream: %v", err)
	opening.Stop()
	s := &answer{c.t, resp.StatusCode, resp.Header, make(chan event), cancel}
	go func() {
		defer close(s.events)
		defer resp.Body.Close()
		for e := range events(resp.Body) {
			select {
			case s.events <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return s
}

// poll is all of an answer that ends at once.
func (c *client) poll(lastEventID string) []event {
	c.t.Helper()
	return c.stream("wait=0", lastEventID).until("end")
}

// newcomer is what a reader hears who comes now.
func (c *client) newcomer() []string {
	c.t.Helper()
	return heard(c.poll(""))
}

// next returns the next event, of kind "end" when the answer has ended.
func (s *answer) next(timeout time.Duration) event {
	s.t.Helper()
	select {
	case e, ok := <-s.events:
		require(s.t, ok, "reading behind the end of a stream")
		return e
	case <-time.After(timeout):
		s.t.Fatalf("no event within %v", timeout)
		return event{}
	}
}

// until returns the events up to and with the next of this kind, or with this text.
func (s *answer) until(what string) (got []event) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		e := s.next(time.Until(deadline))
		got = append(got, e)
		if e.kind == what || e.kind == "message" && e.text() == what {
			return got
		}
		if e.kind == "end" { // tell takes long for many
			s.t.Fatalf("the stream ended before %q, after %.500q", what, tell(got))
		}
	}
}

// upTo is what a reader hears up to a text.
func (s *answer) upTo(text string) []string {
	s.t.Helper()
	return heard(s.until(text))
}

// message returns the next message; before it only pings may come.
func (s *answer) message() event {
	s.t.Helper()
	got := s.until("message")
	for _, e := range got[:len(got)-1] {
		require(s.t, e.kind == "ping", "got %q, want a message", tell(got))
	}
	return got[len(got)-1]
}

// hears fails unless the next messages are these, each as "user: text".
func (s *answer) hears(lines ...string) {
	s.t.Helper()
	for _, want := range lines {
		got := s.message().said()
		require(s.t, got == want, "heard %.200q, want %.200q", got, want)
	}
}

// An event is what the HTML standard makes of a part of the stream.
type event struct {
	kind  string // "message" when the stream gives no name
	id    string // the last id at this point, not only one of its own
	data  string
	retry []int // the reconnection times read since the event before
}

var clockTime = regexp.MustCompile(`^\[([01]\d|2[0-3]):[0-5]\d:[0-5]\d\] `)

// said is a message without its time.
func (e event) said() string { return clockTime.ReplaceAllString(e.data, "") }

// in is an event in one line.
func (e event) in() string { return e.kind + " " + e.id + ": " + e.data }

// text is a message without its time and its sender, if it has one.
func (e event) text() string {
	said := e.said()
	if _, text, ok := strings.Cut(said, ": "); ok {
		return text
	}
	return said
}

// said of several events are their messages without the time.
func said(events []event) (lines []string) {
	for _, e := range events {
		if e.kind == "message" {
			lines = append(lines, e.said())
		}
	}
	return lines
}

// tell is events in words: of a message its text, of another event its kind in brackets.
func tell(events []event) (words []string) {
	for _, e := range events {
		word := "(" + e.kind + ")"
		if e.kind == "message" {
			word = e.text()
		}
		words = append(words, word)
	}
	return words
}

// heard is tell without what comes when there is nothing to hear.
func heard(events []event) []string {
	return slices.DeleteFunc(tell(events), func(word string) bool {
		return word == "(ping)" || word == "(wait)" || word == "(end)"
	})
}

// betweenGaps cuts what a reader heard at its gaps.
func betweenGaps(words []string) (parts [][]string) {
	for {
		gap := slices.Index(words, "(gap)")
		if gap < 0 {
			return append(parts, words)
		}
		parts = append(parts, words[:gap])
		words = words[gap+1:]
	}
}

// doubled tells whether a word is there twice.
func doubled(words []string) bool {
	return len(slices.Compact(slices.Sorted(slices.Values(words)))) < len(words)
}

// events yields those of a stream, and when that ends one of kind "end".
func events(stream io.Reader) iter.Seq[event] {
	return func(yield func(event) bool) {
		in := &eventReader{in: bufio.NewReader(stream)}
		for {
			e, err := in.next()
			if err != nil {
				e.kind = "end"
			}
			if !yield(e) || err != nil {
				return
			}
		}
	}
}

// An eventReader reads a stream by the rules of
// https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream.
type eventReader struct {
	in     *bufio.Reader
	begun  bool   // the first line, which may have a byte order mark, is read
	cr     bool   // the last line ended in CR: an LF now belongs to it
	lastID string // stays until the next id
}

// next returns the next event. With an error it returns what it has read of retry; the
// standard drops an event that is not finished.
func (r *eventReader) next() (event, error) {
	var e event
	data := ""
	for {
		line, err := r.line()
		if err != nil {
			return event{retry: e.retry}, err
		}
		if line == "" && data != "" {
			e.kind, e.id, e.data = cmp.Or(e.kind, "message"), r.lastID, strings.TrimSuffix(data, "\n")
			return e, nil
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "":
			e.kind = ""
		case field == "event":
			e.kind = value
		case field == "data":
			data += value + "\n"
		case field == "id" && !strings.Contains(value, "\x00"):
			r.lastID = value
		case field == "retry" && value != "" && strings.Trim(value, "0123456789") == "":
			ms, _ := strconv.Atoi(value)
			e.retry = append(e.retry, ms)
		}
	}
}

func (r *eventReader) line() (string, error) {
	var line []byte
	for {
		b, err := r.in.ReadByte()
		if err != nil {
			return "", err
		}
		afterCR := r.cr
		r.cr = b == '\r'
		switch {
		case b == '\n' && afterCR:
		case b == '\n' || b == '\r':
			text := string(line)
			if !r.begun {
				text = strings.TrimPrefix(text, "\uFEFF")
			}
			r.begun = true
			return text, nil
		default:
			line = append(line, b)
		}
	}
}

func TestEventReader(t *testing.T) {
	t.Parallel()
	a, b, c := event{kind: "message", data: "a"}, event{kind: "message", data: "b"}, event{kind: "message", data: "c"}
	for _, test := range []struct {
		name, stream string
		want         []event
	}{
		{"a message", "data: a\n\n", []event{a}},
		{"one space is dropped", "data:  a\ndata:b\n\n", []event{{kind: "message", data: " a\nb"}}},
		{"every field", "retry: 10\nid: 7\nevent: ping\ndata:\n\n", []event{{"ping", "7", "", []int{10}}}},
		{"three line endings", "data: a\r\rdata: b\r\n\r\ndata: c\n\n", []event{a, b, c}},
		{"byte order mark", "\uFEFFdata: a\n\n\uFEFFdata: b\n\n", []event{a}},
		{"comments and unknown fields", ": x\nfoo: y\ndata: a\n\n", []event{a}},
		{"a field without a colon", "data\ndata\n\n", []event{{kind: "message", data: "\n"}}},
		{"without data nothing", "event: ping\n\ndata: a\n\n", []event{a}},
		{"the id stays", "id: 1\n\ndata: a\n\nid: 2\x00\ndata: b\n\n",
			[]event{{kind: "message", id: "1", data: "a"}, {kind: "message", id: "1", data: "b"}}},
		{"retry takes digits only", "retry: 1s\nretry:\nretry: 20\ndata: a\n\n",
			[]event{{kind: "message", data: "a", retry: []int{20}}}},
		{"an unfinished event is dropped, its retry is not", "data: a\n\nretry: 7\ndata: b\n", []event{a, {kind: "end", retry: []int{7}}}},
	} {
		got := slices.Collect(events(strings.NewReader(test.stream)))
		if last := len(got) - 1; got[last].retry == nil {
			got = got[:last]
		}
		same(t, fmt.Sprint(got), fmt.Sprint(test.want), "%s: %q gives %v, want %v", test.name, test.stream, got, test.want)
	}
}

// dial opens a connection to the server, for what no HTTP client would do with it.
func dial(t testing.TB, url string) net.Conn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", strings.TrimPrefix(url, "http://"), patience)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// raw joins the lines of a request's header.
func raw(lines ...string) string { return strings.Join(lines, "\r\n") + "\r\n\r\n" }

func rawGet(target string) string { return raw("GET "+target+" HTTP/1.1", "Host: chat") }

// rawPost is a message with headers of its own, which must say how long it is.
func rawPost(body string, headers ...string) string {
	return raw(append([]string{"POST /post HTTP/1.1", "Host: chat", "Content-Type: application/x-www-form-urlencoded"}, headers...)...) + body
}

// rawRequest writes bytes to the server and reads its answer.
func rawRequest(t testing.TB, url, request string) response {
	t.Helper()
	conn := dial(t, url)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, request) // the server may have answered before it is all written
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return response{}
	}
	body, _ := io.ReadAll(resp.Body)
	return response{resp.StatusCode, resp.Header, string(body)}
}

// ---- log ----

// numbered returns n messages whose ids and lines count from first.
func numbered(first, n int) (list []entry) {
	for i := first; i < first+n; i++ {
		list = append(list, entry{testID(i), fmt.Sprint("line ", i)})
	}
	return list
}

func testID(i int) string { return fmt.Sprintf("id-%013d~aaaaaaaa", i) }

// gapAt is an entry of the log that says that messages may be missing.
func gapAt(i int) entry { return entry{testID(i), gapLine} }

// nameOf is keyOf, by other means.
func nameOf(id string) string { key, _, _ := strings.Cut(id, "~"); return key }

// newTestLog returns a log that holds these.
func newTestLog(t testing.TB, history int, lists ...[]entry) *Log {
	l := newLog(ringSize, history)
	t.Cleanup(l.close)
	l.rebuild(slices.Concat(lists...), false)
	return l
}

// inMemory is the room of a log that nobody shares.
func inMemory(l *Log) *room { return &room{log: l} }

// drain reads to the end of the log, or for long, and returns what a reader is told there.
func drain(l *Log, c *cursor) []string {
	var all []byte
	for more, reads := true, 0; more && reads < 2*ringSize; reads++ {
		n := l.read(c, true)
		all = append(all, n.frames...)
		more = n.more
	}
	return heard(slices.Collect(events(bytes.NewReader(all))))
}

func lines(list []entry) (all []string) {
	for _, m := range list {
		all = append(all, m.line)
	}
	return all
}

func TestLogPlaces(t *testing.T) {
	foreign := entry{testID(3) + ".abcdefgh", "foreign"}
	full := slices.Concat(numbered(0, 4), []entry{foreign}, numbered(4, 3))
	withGap := slices.Concat(numbered(0, 2), []entry{gapAt(100)}, numbered(2, 2), []entry{{testID(101), "!unknown act"}})
	const lost = "(gap), line 4, line 5, line 6"
	for _, test := range []struct {
		name, id string
		log      []entry
		want     string
	}{
		{"a newcomer gets the newest history", "", full, "line 4, line 5, line 6"},
		{"a newcomer to an empty room gets nothing", "", nil, ""},
		{"cursor 0 is the beginning", "0", full, "line 0, line 1, line 2, line 3, foreign, line 4, line 5, line 6"},
		{"cursor 0 is the beginning of an empty log", "0", nil, ""},
		{"an id goes on after its message", testID(4), full, "line 5, line 6"},
		{"the newest id has everything", testID(6), full, ""},
		{"a foreign id goes on after its message", foreign.id, full, "line 4, line 5, line 6"},
		{"one not known here goes on after the announced one", testID(3) + ".zzzzzzzz", full, "foreign, line 4, line 5, line 6"},
		{"one before the first message goes on at the beginning", "0.zzzzzzzz", full[:2], "line 0, line 1"},
		{"what cannot be an id is lost", "x", full, lost},
		{"nor can a key alone", nameOf(testID(1)), full, lost},
		{"nor an id with a line break", testID(1) + "\n", full, lost},
		{"nor one with a dot and not eight letters", testID(1) + ".1234567!", full, lost},
		{"an id whose key has another tail here is lost", nameOf(testID(1)) + "~bbbbbbbb", full, lost},
		{"a newcomer is told no gap, and gets its messages by number", "", withGap, "line 1, line 2, line 3"},
		{"who comes to a gap is told it once, and goes back to the history", testID(0), withGap, "line 1, (gap), line 1, line 2, line 3"},
		{"but never forward", testID(0), append(withGap, numbered(4, 2)...), "line 1, (gap), line 2, line 3, line 4, line 5"},
		{"who was told goes on behind it", testID(100), withGap, "line 2, line 3"},
	} {
		l, c := newTestLog(t, 3, test.log), cursor{after: test.id}
		same(t, strings.Join(drain(l, &c), ", "), test.want, "%s: from %q", test.name, test.id)
	}
	expect(t, newTestLog(t, 3, full).read(&cursor{after: testID(99)}, false).unknown, "an id that may be on its way is known")
}

func TestLogKeepsTheNewest(t *testing.T) {
	l := newTestLog(t, 2, numbered(0, 1))
	behind, early := cursor{after: testID(0)}, cursor{after: "0"}
	drain(l, &behind)
	for _, m := range numbered(1, ringSize+1) {
		l.append(m)
	}
	want := []string{"(gap)", fmt.Sprint("line ", ringSize), fmt.Sprint("line ", ringSize+1)}
	for name, c := range map[string]cursor{"behind": behind, "early": early, "0": {after: "0"}} {
		same(t, drain(l, &c), want, "a reader %s", name)
	}
	id, held, known := l.idOf(nameOf(testID(1))), len(l.entries()), len(l.ring.index)
	expect(t, id == "" && held == ringSize && known == ringSize,
		"of what left the ring it knows %q; it holds %d entries and %d keys, want %d", id, held, known, ringSize)
	c := cursor{after: testID(2)}
	same(t, len(drain(l, &c)), ringSize-1, "after the oldest message came")
}

func TestLogDropsTheSecondCopy(t *testing.T) {
	l := newTestLog(t, ringSize, numbered(0, 3))
	for _, copied := range []entry{numbered(1, 1)[0], {nameOf(testID(1)) + "~bbbbbbbb", "another text"}} {
		id, added := l.append(copied)
		expect(t, !added && id == testID(1), "appending %v: got %q, %v, want the first one's id and false", copied, id, added)
	}
	c := cursor{after: "0"}
	same(t, drain(l, &c), lines(numbered(0, 3)), "the log holds")
}

// TestLogBuiltAnew reads a while, has the log built from another list, and reads on.
func TestLogBuiltAnew(t *testing.T) {
	foreign := entry{testID(1) + ".foreigna", "foreign"}
	for _, test := range []struct {
		name, id    string
		first, then []entry
		cut         bool
		want        string // after what was read before
	}{
		{"who was at the end goes on there", testID(2), numbered(0, 3), numbered(0, 5), false, "line 3, line 4"},
		{"who was told nothing in an empty log begins at the beginning", "0", nil, numbered(0, 2), false, "line 0, line 1"},
		{"nor does a newcomer to an empty log miss what went in", "", nil, numbered(0, 2), false, "line 0, line 1"},
		{"unless that is cut", "0", nil, numbered(0, 2), true, "(gap), line 0, line 1"},
		{"whose place is gone is lost", testID(2), numbered(0, 3), numbered(5, 2), false, "(gap), line 5, line 6"},
		{"so is whose message has another tail", testID(2), numbered(0, 3), []entry{{nameOf(testID(2)) + "~bbbbbbbb", "line 2"}}, false, "(gap), line 2"},
		{"behind a foreign line one goes on behind what it followed", foreign.id, append(numbered(0, 2), foreign), numbered(0, 3), false, "line 2"},
		{"a gap at the end is told", testID(2), numbered(0, 3), append(numbered(0, 4), gapAt(9)), false, "line 3, (gap), line 0, line 1, line 2, line 3"},
		{"and one that was told before is not", testID(2), append(numbered(0, 3), gapAt(9)),
			slices.Concat(numbered(0, 3), []entry{gapAt(9)}, numbered(3, 1)), false, "line 3"},
	} {
		l, c := newTestLog(t, 10, test.first), cursor{after: test.id}
		drain(l, &c)
		l.rebuild(test.then, test.cut)
		same(t, strings.Join(drain(l, &c), ", "), test.want, "%s", test.name)
	}
}

func TestLogNothingIsKnownBeforeTheFirstJoin(t *testing.T) {
	l := newLog(ringSize, 10)
	defer l.close()
	for _, id := range []string{"", "0", "x", testID(1)} {
		n := l.read(&cursor{after: id}, true)
		expect(t, n.unknown && !n.more && len(n.frames) == 0, "%q is known", id)
	}
	expect(t, l.entries() == nil && l.idOf("x") == "", "there is something in it")
}

// Readers that start anywhere, at any time, all see one order without holes, also while the log is
// built anew.
func TestLogManyReaders(t *testing.T) {
	const n, readers = 3000, 20
	l := newTestLog(t, ringSize)
	together(readers+1, func(r int) {
		if r == readers {
			for i, m := range numbered(0, n) {
				if l.append(m); i%100 == 0 {
					l.rebuild(l.entries(), false)
				}
			}
			return
		}
		var got []string
		for c := (cursor{after: "0"}); len(got) < n; {
			if ahead := c; r%2 == 0 {
				if n := l.read(&ahead, true); len(n.frames) == 0 {
					<-n.wake
				}
			}
			got = append(got, drain(l, &c)...)
		}
		same(t, got, lines(numbered(0, n)), "reader %d saw another order", r)
	})
}

// What comes after a pause is read at once. The next round begins when the one before has had its
// time, and holds all that came meanwhile; nothing but readers waits for it.
func TestRounds(t *testing.T) {
	for _, test := range []struct {
		readers int
		pause   time.Duration
	}{{1, 20 * time.Microsecond}, {30, 600 * time.Microsecond}, {2000, 40 * time.Millisecond}, {4000, 50 * time.Millisecond}} {
		synctest.Test(t, func(t *testing.T) {
			l := newTestLog(t, 0)
			var start time.Time
			told := map[string]int{} // "when what", to how many readers
			var mu sync.Mutex
			read := func() {
				for c, ended := (cursor{after: ""}), false; !ended; {
					n := l.read(&c, true)
					if len(n.frames) > 0 {
						mu.Lock()
						told[fmt.Sprint(time.Since(start), heard(slices.Collect(events(bytes.NewReader(n.frames)))))]++
						mu.Unlock()
					}
					if ended = n.ended; !ended && !n.more {
						<-n.wake
					}
				}
			}
			for range test.readers {
				go read()
			}
			synctest.Wait()
			time.Sleep(heartbeat - time.Second)
			start = time.Now()
			added := l.addition()
			for i := range 9 { // at 0, 1/4, 2/4, ... of the pause
				if i%4 != 0 || i == 0 {
					l.append(numbered(i, i+1)[0])
					synctest.Wait()
					select {
					case <-added:
						added = l.addition()
					default:
						t.Errorf("%d readers: a post waits for a round", test.readers)
					}
				}
				time.Sleep(test.pause / 4)
			}
			l.append(numbered(9, 10)[0])
			l.close() // does not wait either
			synctest.Wait()
			want := map[string]int{
				"0s [line 0]": test.readers,
				fmt.Sprint(test.pause, " [line 1 line 2 line 3]"):   test.readers,
				fmt.Sprint(2*test.pause, " [line 5 line 6 line 7]"): test.readers,
				fmt.Sprint(test.pause/4*9, " [line 9]"):             test.readers,
			}
			same(t, told, want, "%d readers: told", test.readers)
		})
	}
}

// ---- stream ----

// watch runs a stream over a pipe, in a bubble of synctest, until it ends or the time is over, and
// returns what it told, each word with the time it came, as "3s line 2".
func watch(st *stream, limit time.Duration) (told []string, all []event) {
	here, there := net.Pipe()
	st.conn = there
	start := time.Now()
	go func() {
		st.run()
		there.Close()
	}()
	time.AfterFunc(limit, func() { here.Close() })
	for e := range events(here) {
		if e.kind != "end" {
			told, all = append(told, fmt.Sprint(time.Since(start), " ", tell([]event{e})[0])), append(all, e)
		}
	}
	return told, all
}

func from(id string) cursor { return cursor{after: id} }

func TestStreamInTime(t *testing.T) {
	settles := func(r *room) { r.broker.depart(); r.broker.arrive() }
	const second = time.Second
	poll := func(id string, wait time.Duration) stream { return stream{at: from(id), poll: true, wait: wait} }
	for _, test := range []struct {
		name  string
		st    stream
		redis bool
		limit time.Duration
		want  string
		after time.Duration // then, while the stream is open, this happens:
		act   func(r *room)
	}{
		{"a quiet stream pings every 15 s", stream{at: from(testID(1))}, false, 31 * second, "0s (ping), 15s (ping), 30s (ping)", 0, nil},
		{"a message is written at once", stream{at: from(testID(1))}, false, 19 * second, "0s (ping), 3s new, 18s (ping)",
			3 * second, func(r *room) { r.log.append(entry{testID(2), "new"}) }},
		{"a log that is built anew is no heartbeat", stream{at: from(testID(1))}, false, 19 * second, "0s (ping), 18s (ping)",
			3 * second, func(r *room) { r.log.rebuild(numbered(0, 2), false) }},
		{"a gap is told, then the history, and then a ping", stream{at: from(testID(1))}, false, 4 * second,
			"0s (ping), 3s line 2, 3s (gap), 3s line 0, 3s line 1, 3s line 2, 3s (ping)",
			3 * second, func(r *room) { r.log.rebuild(append(numbered(0, 3), gapAt(9)), false) }},
		{"polling ends at once", poll("", 0), false, time.Minute, "0s line 0, 0s line 1, 0s (ping)", 0, nil},
		{"polling without anything new ends at once", poll(testID(1), 0), false, time.Minute, "0s (ping)", 0, nil},
		{"a long poll ends after the history", poll("", 25*second), false, time.Minute, "0s line 0, 0s line 1, 0s (ping)", 0, nil},
		{"a long poll ends after the first message", poll(testID(1), 25*second), false, time.Minute, "0s (ping), 15s (ping), 16s new, 16s (ping)",
			16 * second, func(r *room) { r.log.append(entry{testID(2), "new"}) }},
		{"a long poll ends after its time, not with a heartbeat", poll(testID(1), 25*second), false, time.Minute, "0s (ping), 15s (ping), 25s (ping)", 0, nil},
		{"a long poll over a minute is a minute", poll(testID(1), time.Hour), false, 2 * time.Minute,
			"0s (ping), 15s (ping), 30s (ping), 45s (ping), 1m0s (ping)", 0, nil},
		{"in memory an unknown id is a gap at once", stream{at: from(testID(9))}, false, second, "0s (gap), 0s line 0, 0s line 1, 0s (ping)", 0, nil},
		{"from Redis an unknown id is a gap after a round trip", stream{at: from(testID(9))}, true, 20 * second,
			"0s (wait), 15s (ping), 18s (gap), 18s line 0, 18s line 1, 18s (ping)", 18 * second, settles},
		{"unless it arrives", stream{at: from(testID(9))}, true, 3 * second, "0s (wait), 1s line 10, 1s (ping)",
			second, func(r *room) {
				for _, m := range numbered(8, 3) {
					r.log.append(m)
				}
				settles(r)
			}},
		{"a round trip that began before it came says nothing", stream{at: from(testID(9))}, true, 3 * second, "0s (wait)",
			second, func(r *room) { r.broker.arrive() }},
		{"what cannot be an id is a gap at once", stream{at: from("x")}, true, second, "0s (gap), 0s line 0, 0s line 1, 0s (ping)", 0, nil},
		{"a poll that is not settled tells no gap", poll(testID(9), 0), true, time.Minute, "0s (wait), 2s (ping)", 0, nil},
		{"nor does a long one", poll(testID(9), 16*second), true, time.Minute, "0s (wait), 15s (ping), 16s (ping)", 0, nil},
		{"one that is settled tells it", poll(testID(9), 0), true, time.Minute, "0s (wait), 1s (gap), 1s line 0, 1s line 1, 1s (ping)", second, settles},
		{"a closed log ends the stream", stream{at: from(testID(1))}, false, time.Minute, "0s (ping), 1s (ping)",
			second, func(r *room) { r.log.close() }},
		{"also one that waits", stream{at: from(testID(9))}, true, time.Minute, "0s (wait), 1s (ping)", second, func(r *room) { r.log.close() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := inMemory(newTestLog(t, 200, numbered(0, 2)))
				if test.redis {
					r.broker = newBroker(&config{redis: &url.URL{}}, r.log, t.Logf, nil)
				}
				defer r.log.close()
				test.st.room = r
				if test.act != nil {
					time.AfterFunc(test.after, func() { test.act(r) })
				}
				got, _ := watch(&test.st, test.limit)
				expect(t, strings.Join(got, ", ") == test.want, "\n got %q\nwant %q", strings.Join(got, ", "), test.want)
			})
		})
	}
}

// Until a reader's place is found, what it came with may be anything, and no ping says it.
func TestPingBeforeThePlaceIsFound(t *testing.T) {
	for _, id := range []string{"", testID(9), "x\n\nid: 0\ndata: [09:00:00] Teacher: no homework\n\n"} {
		synctest.Test(t, func(t *testing.T) {
			r := inMemory(newLog(ringSize, 10))
			r.broker = newBroker(&config{redis: &url.URL{}}, r.log, t.Logf, nil)
			_, all := watch(&stream{room: r, at: from(id), poll: true}, time.Minute)
			r.log.close()
			expect(t, len(all) == 2 && all[0].kind == "wait" && all[1].kind == "ping" && all[1].id == "",
				"to %q it tells %+v, want a wait, and a ping without an id", id, all)
		})
	}
}

// A poll that is told a gap ends with it: the next one goes on behind, in a room that is faster than
// its reader, too.
func TestPollIsToldAGapOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var list []entry
		for _, m := range numbered(0, 20) {
			list = append(list, entry{m.id, m.line + strings.Repeat("x", maxPoll/4)})
		}
		l := newTestLog(t, 200, list, []entry{gapAt(99)})
		defer l.close()
		for _, wait := range []time.Duration{0, time.Second} {
			after := testID(19)
			for _, want := range []string{"gap", "ping"} {
				_, all := watch(&stream{room: inMemory(l), at: from(after), poll: true, wait: wait}, time.Minute)
				after = all[len(all)-1].id
				same(t, all[0].kind, want, "wait=%v: the first event", wait)
			}
		}
	})
}

// A busyConn is a connection in a room where somebody posts two blocks each time it is written to.
type busyConn struct {
	net.Conn
	log    *Log
	writes int
}

func (c *busyConn) SetWriteDeadline(time.Time) error { return nil }

func (c *busyConn) Write(b []byte) (int, error) {
	if c.writes++; c.writes > 100 {
		return 0, io.ErrShortWrite
	}
	for _, m := range numbered(2*c.writes, 2) {
		c.log.append(entry{m.id, strings.Repeat("x", blockSize)})
	}
	return len(b), nil
}

// Polling brings what was there when it began, and ends in a room that is faster than its reader.
func TestPollInAFastRoom(t *testing.T) {
	for _, wait := range []time.Duration{0, time.Minute} {
		conn := &busyConn{log: newTestLog(t, 200)}
		(&stream{room: inMemory(conn.log), conn: conn, poll: true, wait: wait, at: from("0")}).run()
		expect(t, conn.writes <= 10, "wait=%v: %d writes, want an end", wait, conn.writes)
	}
}

// A long poll of much ends though there is more, and the next one goes on there; other readers get all
// at once.
func TestLongPollOfMuch(t *testing.T) {
	const n, most = 300, 100 // messages of a kilobyte, most of them over maxPoll and a block
	synctest.Test(t, func(t *testing.T) {
		l := newTestLog(t, ringSize)
		defer l.close()
		var want []string
		for _, m := range numbered(0, n) {
			m.line += strings.Repeat("x", 1000)
			l.append(m)
			want = append(want, m.line)
		}
		answer := func(after string, wait time.Duration) []string {
			_, all := watch(&stream{room: inMemory(l), at: from(after), poll: true, wait: wait}, time.Minute)
			require(t, len(all) != 0 && all[len(all)-1].kind == "ping", "the answer after %q has no ping at its end", after)
			return heard(all)
		}
		var got []string
		for after := "0"; len(got) < n; after = testID(len(got) - 1) {
			part := answer(after, 25*time.Second)
			require(t, len(part) != 0 && len(part) <= most,
				"a long poll after %s brings %d messages, want some and at most %d", after, len(part), most)
			got = append(got, part...)
		}
		same(t, got, want, "the long polls bring")
		same(t, answer("0", 0), want, "polling brings")
	})
}

// A reader that stops reading is given up.
func TestStreamGivesUpAStalledReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLog(t, 200)
		defer l.close()
		here, there := net.Pipe()
		defer here.Close()
		start := time.Now()
		(&stream{room: inMemory(l), conn: there}).run()
		took := time.Since(start)
		expect(t, took >= writeTimeout && took <= writeTimeout+writeRenew,
			"given up after %v, want %v to %v", took, writeTimeout, writeTimeout+writeRenew)
	})
}

// A pipeListener is a listener without sockets, so that a server can run in a bubble of
// synctest, where time passes at once and exactly.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	if conn, ok := <-l; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (l pipeListener) Close() error   { close(l); return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// send opens a connection, writes a request on it and, if told so, reads what is answered.
func (l pipeListener) send(request string, reads bool) {
	here, there := net.Pipe()
	l <- there
	io.WriteString(here, request)
	synctest.Wait()
	if reads {
		go io.Copy(io.Discard, here)
		synctest.Wait()
	}
}

// newTestServer is a room in memory that nobody serves.
func newTestServer(t testing.TB, cfg *config, logf func(string, ...any)) *server {
	t.Helper()
	s, err := newServer(cfg, logf)
	must(t, err)
	t.Cleanup(s.room.log.close)
	return s
}

// ask has it answer "METHOD /path", with a form, to a peer and with headers "Name: value".
func (s *server) ask(request, body, peer string, headers ...string) *httptest.ResponseRecorder {
	method, path, _ := strings.Cut(request, " ")
	r, w := httptest.NewRequest(method, path, strings.NewReader(body)), httptest.NewRecorder()
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.RemoteAddr = peer + ":4711"
	for _, h := range headers {
		if name, value, ok := strings.Cut(h, ": "); ok {
			r.Header.Set(name, value)
		}
	}
	s.ServeHTTP(w, r)
	return w
}

// No connection that does nothing for the room stays for ever, and shutdown takes no time, or
// stopTimeout where somebody holds it up.
func TestConnectionsInTime(t *testing.T) {
	expect(t, idleTimeout > time.Minute, "an idle connection is closed after %v, which may be before a proxy does", idleTimeout)
	for _, test := range []struct {
		name, request string
		reads         bool          // what is answered
		stays         time.Duration // if the room stays open
		stops         time.Duration // how long shutdown takes
	}{
		{"nothing is sent", "", true, headerTimeout, stopTimeout},
		{"half a header", "GET /login HTT", true, headerTimeout, stopTimeout},
		{"no body", rawPost("", "Content-Length: 9"), true, requestTimeout, stopTimeout},
		{"half a body", rawPost("mess", "Content-Length: 9"), true, requestTimeout, stopTimeout},
		{"an answer that nobody reads", rawGet("/login"), false, answerTimeout, stopTimeout},
		{"a whole request and nothing after it", rawGet("/login"), true, idleTimeout, 0},
		{"a whole request and half of another", rawGet("/login") + "GET /", true, headerTimeout, 0},
		{"a stream", rawGet("/stream"), true, never, 0},
		{"a long poll", rawGet("/stream?wait=25s"), true, 25 * time.Second, 0},
		{"a stream that nobody reads", rawGet("/stream"), false, writeTimeout + writeRenew, stopTimeout},
	} {
		inTime(t, test.name, test.stays, test.stops, func(pipes pipeListener) (end func()) {
			pipes.send(test.request, test.reads)
			return func() {}
		})
	}
}

// inTime sees, in a bubble each, how long a connection stays if the room stays open, and how long it
// holds shutdown up. What is done with it may have an end of its own.
func inTime(t *testing.T, name string, stays, stops time.Duration, does func(pipes pipeListener) (end func())) {
	for _, closes := range []bool{false, true} {
		t.Run(fmt.Sprintf("%s, shutdown %v", name, closes), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t, &config{}, t.Logf)
				srv, pipes := s.httpServer(t.Context()), make(pipeListener)
				go srv.Serve(pipes)
				start := time.Now()
				defer does(pipes)()
				if closes {
					s.shutdown(srv)
					took := time.Since(start)
					synctest.Wait()
					expect(t, took == stops && s.conns.Load() == 0, "it took %v and left %d connections, want %v and none", took, s.conns.Load(), stops)
					return
				}
				for s.conns.Load() > 0 && time.Since(start) < never {
					time.Sleep(time.Second)
					synctest.Wait()
				}
				took := time.Since(start)
				expect(t, took >= stays && took <= stays+2*time.Second, "it is gone after %v, want %v", took, stays)
				s.shutdown(srv)
			})
		})
	}
}

const never = time.Hour // longer than anything in a bubble may stay

// A hijacker is a request whose connection can be taken over only when the test says so.
type hijacker struct {
	*httptest.ResponseRecorder
	conn net.Conn
	may  chan struct{}
}

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	<-h.may
	return h.conn, nil, nil
}

// A stream whose connection is being taken over when the end begins is waited for and told, or cut
// off, like every other; one that comes later is refused.
func TestShutdownWhileTakingOver(t *testing.T) {
	for _, late := range []time.Duration{0, 2 * stopTimeout} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t, &config{}, t.Logf)
			s.conns.Add(1)
			here, there := net.Pipe()
			w := &hijacker{httptest.NewRecorder(), there, make(chan struct{})}
			go s.takeOver(w, &stream{room: s.room}, "200 OK")
			synctest.Wait()
			start, ended := time.Now(), make(chan time.Duration, 1)
			go func() {
				s.shutdown(&http.Server{})
				ended <- time.Since(start)
			}()
			synctest.Wait()
			expect(t, len(ended) == 0, "it ended without the stream")
			refused := httptest.NewRecorder()
			s.takeOver(refused, &stream{room: s.room}, "200 OK")
			expect(t, refused.Code == 503, "a stream that comes then: got %d, want 503", refused.Code)
			time.Sleep(late)
			close(w.may)
			got, _ := io.ReadAll(here)
			told := strings.Contains(string(got), "\nevent: ping\n")
			expect(t, late != 0 || told, "taken over after %v it was told %q", late, got)
			took := <-ended
			expect(t, took == late && s.conns.Load() == 0,
				"it took %v, and left %d connections, want %v and none", took, s.conns.Load(), late)
		})
	}
}

// ---- pure ----

func TestSession(t *testing.T) {
	k, now := newSigner("key", ""), time.Unix(1_800_000_000, 0)
	who := session{id: "abc", name: "小明 [.]", expires: now}
	value := k.sign(who)
	got, ok := k.verify(value, now.Add(-time.Nanosecond))
	expect(t, ok && got == who, "a nanosecond before it expires: got %v, %v, want %v", got, ok, who)
	_, late := k.verify(value, now)
	expect(t, !late, "an expired session is accepted")
	for name, other := range map[string]*signer{"key": newSigner("other", ""), "password": newSigner("key", "secret"),
		"label": {key: []byte("key")}} {
		_, ok := other.verify(value, now.Add(-time.Second))
		expect(t, !ok, "a session under another %s is accepted", name)
	}
}

func TestLimiter(t *testing.T) {
	l, now := limiter{every: time.Second, burst: 3}, time.Unix(1_800_000_000, 0)
	take := func(key string, at time.Duration, want time.Duration) {
		t.Helper()
		same(t, l.take(key, now.Add(at)), want, "%s at %v: wait", key, at)
	}
	take("a", 0, 0)
	take("a", 0, 0)
	take("a", 0, 0)
	take("a", 0, time.Second)
	take("b", 0, 0)
	take("a", time.Second-1, 1)
	take("a", time.Second, 0)
	take("a", time.Second, time.Second)
	l.giveBack("a")
	take("a", time.Second, 0)
	for i := range 5000 {
		take(fmt.Sprint(i), time.Hour+time.Duration(i)*time.Minute, 0)
	}
	n := len(l.whole)
	expect(t, n <= 1100, "%d keys are kept, though only one is not full", n)
	none := limiter{}
	for range 100 {
		require(t, none.take("a", now) == 0, "no limit limits")
	}
}

func TestAddress(t *testing.T) {
	for _, test := range []struct {
		peer string
		via  []string
		want string
	}{
		{"192.0.2.7:1234", nil, "192.0.2.7"},
		{"192.0.2.7:1234", []string{"203.0.113.9"}, "192.0.2.7"},
		{"127.0.0.1:1", []string{"203.0.113.9, 198.51.100.2"}, "198.51.100.2"},
		{"[::1]:1", []string{"203.0.113.9", "198.51.100.2"}, "198.51.100.2"},
		{"127.0.0.1:1", []string{"nonsense"}, "127.0.0.1"},
		{"127.0.0.1:1", []string{""}, "127.0.0.1"},
		{"127.0.0.1:1", []string{"203.0.113.5:4711"}, "203.0.113.5"},
		{"127.0.0.1:1", []string{"192.0.2.9, 203.0.113.5:4711 "}, "203.0.113.5"},
		{"127.0.0.1:1", []string{"203.0.113.9 198.51.100.2"}, "198.51.100.2"},
		{"127.0.0.1:1", []string{"203.0.113.9,\t198.51.100.2 ,"}, "198.51.100.2"},
		{"127.0.0.1:1", []string{"203.0.113.9", ""}, "203.0.113.9"},
		{"127.0.0.1:1", []string{"[2001:db8::1]:4711"}, "2001:db8::"},
		{"127.0.0.1:1", []string{"[2001:db8::1]"}, "2001:db8::"},
		{"127.0.0.1:1", []string{"2001:db8::1"}, "2001:db8::"},
		{"127.0.0.1:1", []string{"::ffff:203.0.113.5"}, "203.0.113.5"},
		{"[::ffff:127.0.0.1]:1", []string{"203.0.113.5"}, "203.0.113.5"},
		{"127.0.0.1:1", []string{"\"[2001:db8::1]\", unknown"}, "127.0.0.1"},
		{"[::ffff:192.0.2.7]:1", nil, "192.0.2.7"},
		{"[2001:db8:1:2:3:4:5:6]:1", nil, "2001:db8:1:2::"},
		{"[fe80::1%eth0]:1", nil, "fe80::"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = test.peer
		r.Header["X-Forwarded-For"] = test.via
		same(t, address(r), test.want, "peer %s via %q", test.peer, test.via)
	}
}

func TestSecure(t *testing.T) {
	for proto, want := range map[string]bool{"": false, "http": false, "https": true, "HTTPS": true, "https,http": true,
		"https , http": true, "http, https": false, "httpsx": false, ",https": false} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("X-Forwarded-Proto", proto)
		same(t, secure(r), want, "X-Forwarded-Proto %q", proto)
	}
}

func TestJoinURL(t *testing.T) {
	const localhost, lan = "http://localhost:8989", "http://192.168.1.20:8989"
	for _, test := range []struct {
		name, host, proto, want string
		urls                    []string
		origins                 string
	}{
		{"a name", "chat.example.org", "https", "https://chat.example.org", nil, ""},
		{"an address on the network", "192.168.1.20:8989", "", lan, nil, ""},
		{"opened here", "localhost:8989", "", lan, []string{localhost, lan}, ""},
		{"opened here by number", "[::1]:8989", "", lan, []string{localhost, lan}, ""},
		{"no network", "localhost:8989", "", localhost, []string{localhost}, ""},
		{"a proxy that changes Host", "backend:8989", "", "https://chat.example.org", nil, "-origin https://chat.example.org/"},
		{"the first of two", "localhost:8989", "", "http://a.example", []string{localhost, lan}, "-origin http://A.example:80 -origin http://b.example"},
	} {
		cfg, err := configure(strings.Fields(test.origins), environ(), io.Discard)
		must(t, err)
		r := httptest.NewRequest("GET", "/", nil)
		r.Host = test.host
		r.Header.Set("X-Forwarded-Proto", test.proto)
		same(t, (&server{cfg: cfg, urls: test.urls}).joinURL(r), test.want, "%s", test.name)
	}
}

func TestLanguage(t *testing.T) {
	for accept, want := range map[string]string{
		"": "en", "zh": "zh", "zh-CN,zh;q=0.9,en;q=0.8": "zh", "en-US,en;q=0.9,zh;q=0.8": "en",
		"fr, de": "en", "fr, zh;q=0.1": "zh", "zh;q=0": "en", "en;q=0.3, ZH-TW;q=0.7": "zh", ";;q=x,,": "en",
	} {
		same(t, language(accept), want, "language(%q)", accept)
	}
}

func TestCookieValues(t *testing.T) {
	h := http.Header{"Cookie": {"a=1; " + cookieName + "=x y\"; b", cookieName + "=;" + cookieName + " =no;" + cookieName + "2=no"}}
	same(t, cookieValues(h), []string{"x y\"", ""}, "cookies")
}

func TestRedactHidesThePassword(t *testing.T) {
	for _, text := range []string{"redis://:secret@host:1", "redis://u:secret@h", "-x=redis://u:se@cret@h", "u:secret@h",
		"invalid value \"redis://:secret@h\" for flag"} {
		got := redact(text)
		expect(t, !strings.Contains(got, "cret"), "redact(%q): got %q", text, got)
	}
}

func TestParseRedis(t *testing.T) {
	for text, want := range map[string]string{
		"localhost:6379": "redis://localhost:6379", "redis://h": "redis://h", "rediss://:secret@h:1/0": "rediss://:secret@h:1/0",
		"redis://h/": "redis://h/", "redis://[::1]": "redis://[::1]", "[::1]:6379": "redis://[::1]:6379",
		"localhost": "", "http://h": "", "redis://": "", "redis://h/x": "", "redis:h:1": "", "h:1/2": "", "redis://h:port": "",
		"redis://:12#secret@h:1": "", "redis://u:12?secret@h": "", "redis://h:99999": "", "redis://:secret@h:1:2": "", "redis://h:1/2/": "",
	} {
		u, err := parseRedis(text)
		expect(t, (err == nil) == (want != "") && (err != nil || u.String() == want),
			"parseRedis(%q): got %v, %v, want %q", text, u, err, want)
		expect(t, err == nil || !strings.Contains(err.Error(), "secret"), "parseRedis(%q): the error has the password: %v", text, err)
	}
}

func TestOrigin(t *testing.T) {
	for text, want := range map[string]string{
		"https://chat.example.org": "https://chat.example.org", "HTTPS://Chat.Example.ORG": "https://chat.example.org",
		"https://chat.example.org/": "https://chat.example.org", "https://h_1:443": "https://h_1", "http://h:80": "http://h",
		"http://h:443": "http://h:443", "https://h:80": "https://h:80", "http://h:8080": "http://h:8080", "http://h:": "http://h",
		"https://h:0443": "https://h", "http://xn--bcher-kva.example": "http://xn--bcher-kva.example",
		"http://192.168.1.20:8080": "http://192.168.1.20:8080", "http://[2001:DB8:0::1]": "http://[2001:db8::1]",
		"http://[::1]:80": "http://[::1]", "https://[::443]:443": "https://[::443]",
		"https://聊天.example": "", "https://*.example.org": "", "*": "", "null": "", "https://u:secret@h": "", "https://u@h": "",
		"https://h/chat": "", "https://h?x": "", "https://h#x": "", "chat.example.org": "", "ftp://h": "", "https:h": "", "https://": "",
		"https://:443": "", "https://h:99999": "", "https://h:https": "", "http://192.168.1": "", "http://192.168.1.20.": "",
		"http://[fe80::1%25eth0]": "", "https://a b": "", "https://a,https://b": "", "": "",
	} {
		cfg, err := configure([]string{"-origin", text}, environ(), io.Discard)
		expect(t, (err == nil) == (want != "") && (err != nil || cfg.origin == want),
			"-origin %q: got %v, %v, want %q", text, cfg, err, want)
		expect(t, err == nil || !strings.Contains(err.Error(), "secret"), "-origin %q: the error has the password: %v", text, err)
	}
}

// FuzzFrame: a text that is cleaned and encoded is one event with that text and id, whatever
// was in it.
func FuzzFrame(f *testing.F) {
	for _, s := range []string{"hi", "a\nb", "\r\n\r\nid: forged\rdata: x", "\ufeffa", "event: gap", "a\x00\xff", "\u2028", "a\v\f\x1c\x1d\x1e\u0085\u2029b", "retry: 1\n\n", " x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		text, cut := clean(s, maxMessage)
		require(t, utf8.ValidString(text) && utf8.RuneCountInString(text) <= maxMessage, "clean(%q) gave %q", s, text)
		again, _ := clean(text, maxMessage)
		require(t, again == text, "cleaned again, %q became %q", text, again)
		all, _ := clean(s, len(s))
		require(t, cut == (utf8.RuneCountInString(all) > maxMessage), "clean(%q) says cut: %v", s, cut)
		checkFrame(t, entry{testID(1), "x: " + text})
	})
}

// FuzzRedisLine: whatever another program publishes is at most one event, and survives the way
// through the list.
func FuzzRedisLine(f *testing.F) {
	for _, s := range []string{"[12:34:56] 小明: 你好", "a\r\nb", "\xff\x00", strings.Repeat("x", maxLine+1), "\u200b", "id: x\n\ndata: y", "!gap"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		line := fromRedis(raw)
		require(t, utf8.ValidString(line) && utf8.RuneCountInString(line) <= maxLine, "fromRedis(%q) gave %q", raw, line)
		stored := toRedis(line)
		require(t, !strings.ContainsAny(stored, "\r\n") && fromRedis(stored) == line, "%q is stored as %q", line, stored)
		checkFrame(t, entry{testID(1) + ".abcdefgh", line})
	})
}

func checkFrame(t *testing.T, m entry) {
	t.Helper()
	frame := encode(m)
	got := slices.Collect(events(bytes.NewReader(frame)))
	require(t, len(got) == 2 && got[0].kind == "message" && got[0].id == m.id && got[0].data == m.line && got[1].retry == nil,
		"the frame of %q reads as %+v", m.line, got)
	require(t, !strings.ContainsAny(string(frame), "\r\v\f\x1c\x1d\x1e\u0085\u2028\u2029"),
		"the frame of %q has more lines where bytes or text are split as Python does", m.line)
	require(t, len(frame) <= 2*blockSize, "the frame of %q is %d bytes", m.line, len(frame))
}

// FuzzCookie: a value that verifies is one that was signed.
func FuzzCookie(f *testing.F) {
	k, now := newSigner("key", "password"), time.Unix(1_800_000_000, 0)
	signed := k.sign(session{id: "abc", name: "小明", expires: now.Add(time.Hour)})
	for _, s := range []string{signed, "", ".", "v1.....", "v1.9999999999.a.b." + k.mac("v1.9999999999.a.b"), signed + "A", signed[1:]} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		s, ok := k.verify(value, now)
		require(t, !ok || k.sign(s) == value, "%q verifies as %+v", value, s)
		require(t, ok || value != signed, "%q does not verify", value)
	})
}

// ---- http ----

// Keys that a client may choose, none of which is ever drawn, and an id that no message has.
const (
	keyA      = "aaaaaaaaaaaaaaaa"
	keyB      = "bbbbbbbbbbbbbbbb"
	unknownID = "no-such-message-here~aaaaaaaa"
)

var (
	anyID     = regexp.MustCompile(`^[A-Za-z0-9_-]{16,64}~[a-z2-7]{8}$`)
	drawnID   = regexp.MustCompile(`^[A-Z2-7]{26}~[a-z2-7]{8}$`)
	foreignID = regexp.MustCompile(`^(0|[A-Za-z0-9_-]{16,64}~[a-z2-7]{8})\.[a-z]{8}$`)
)

// A witness hears everything that reaches a room, from before the table of a test to its end.
type witness struct {
	*answer
	c *client
}

func newWitness(t testing.TB, url string) *witness {
	t.Helper()
	c := newClient(t, url)
	s := c.stream("", "")
	s.until("ping")
	return &witness{s, c}
}

// message returns the next message. Before it only heartbeats may come, and no retry.
func (w *witness) message() event {
	w.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		e := w.next(time.Until(deadline))
		require(w.t, e.retry == nil && (e.kind == "message" || e.kind == "ping" && e.data == "") && utf8.ValidString(e.data),
			"a witness got %.300v, want a message", e)
		if e.kind == "message" {
			return e
		}
	}
}

// heard fails unless these lines, each "user: text", are all that came, and if the room does
// not serve any more.
func (w *witness) heard(lines ...string) {
	w.t.Helper()
	const last = "the room still serves"
	w.c.say(last)
	for _, want := range append(slices.Clip(lines), "anonymous: "+last) {
		got := w.message().said()
		require(w.t, got == want, "a witness got %.200q, want %.200q", got, want)
	}
	expect(w.t, w.c.healthy(), "afterwards the room is not healthy")
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	stranger := newClient(t, startRoom(t).url)
	member := newClient(t, stranger.url).login("小明")
	outside := newClient(t, startRoom(t, "CHAT_PASSWORD=geheim").url)
	inside := newClient(t, outside.url)
	inside.do("POST", "/login", form("user", "小明", "password", "geheim"))
	for _, test := range []struct {
		name     string
		who      *client
		requests string
		status   int
		location string
	}{
		{"with a session", member, "GET /", 200, ""},
		{"without one", stranger, "GET /", 303, "/login"},
		{"what needs none", stranger, "GET /login, GET /lesson, GET /healthz, GET /metrics, GET /stream?wait=0", 200, ""},
		{"logging out", newClient(t, stranger.url).login("x"), "POST /logout", 303, "/login"},
		{"of a closed room", outside, "GET /, GET /lesson", 303, "/login"},
		{"what needs no session there", outside, "GET /login, GET /healthz", 200, ""},
		{"what does", outside, "GET /stream, POST /post", 401, ""},
		{"with a session there", inside, "GET /, GET /lesson, GET /stream?wait=0", 200, ""},
		{"posting there", inside, "POST /post", 204, ""},
		{"what is nowhere", stranger, "GET /nothing, POST /nothing, GET /login/x, GET /stream/, GET /Login, GET /assets/nothing.js, GET /assets/, GET /main.go", 404, ""},
		{"a path that is not clean", stranger, "GET /x/../login, GET /./login", 307, "/login"},
	} {
		for request := range strings.SplitSeq(test.requests, ", ") {
			method, path, _ := strings.Cut(request, " ")
			got := test.who.do(method, path, "message=x")
			expect(t, got.status == test.status && got.header.Get("Location") == test.location,
				"%s: %s: got %d, Location %q, want %d, %q", test.name, request, got.status, got.header.Get("Location"), test.status, test.location)
		}
	}
	same(t, strings.TrimSpace(stranger.get("/healthz").body), "ok", "a healthy room says")
	expect(t, strings.Contains(member.get("/").body, "小明"), "the chat page does not greet by name")
}

// Python's clients split lines at more than the standard does, some in the bytes and some in the text,
// and take every block for an event. They hear what a browser hears: nothing is forged, no event is
// empty, and no character is cut.
func TestStreamOfPython(t *testing.T) {
	t.Parallel()
	room := startRoom(t)
	c := newClient(t, room.url)
	for _, text := range []string{"部分", "two\r\nlines", "x\u2029\u2029id: 0\u2029data: [09:00:00] Teacher: no homework\u2029\u2029",
		"a\vb\fc\x1cd\x1de\x1ef\u0085g\u2028h", strings.Repeat("部", 4000)} {
		c.say(text)
	}
	var want []string
	for _, e := range c.poll("") {
		if e.kind != "end" {
			want = append(want, fmt.Sprintf("%q %q", e.kind, e.data))
		}
	}
	same(t, len(want), 6, "events, the ping with them")
	for module, readers := range map[string][]string{
		"requests": {
			`requests.get(url, stream=True).iter_lines(decode_unicode=True)`,
			`requests.get(url, stream=True).iter_lines(chunk_size=1, decode_unicode=True)`,
			`[line.decode() for line in requests.get(url, stream=True).iter_lines()]`,
			`[line.decode() for line in requests.get(url).content.splitlines()]`,
			`requests.get(url).text.splitlines()`,
		},
		"httpx": {`httpx.Client().send(httpx.Request("GET", url), stream=True).iter_lines()`, `httpx.get(url).text.splitlines()`},
	} {
		program := "import sys, " + module + "\nurl = sys.argv[1]\n"
		for _, reader := range readers { // the lines of each in hexadecimal, separated by commas
			program += "print(*[line.removesuffix('\\n').encode().hex() for line in " + reader + "], sep=',')\n"
		}
		out, err := python(t, module, program, room.url+"/stream?wait=0").Output()
		must(t, err)
		all := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
		require(t, len(all) == len(readers), "%d of %d readers with %s have printed something", len(all), len(readers), module)
		for i, lines := range all {
			var got []string
			kind, data := "message", []string(nil)
			for line := range strings.SplitSeq(lines, ",") {
				text, err := hex.DecodeString(line)
				must(t, err)
				field, value, _ := strings.Cut(string(text), ": ")
				switch field {
				case "event":
					kind = value
				case "data", "data:":
					data = append(data, value)
				case "":
					got = append(got, fmt.Sprintf("%q %q", kind, strings.Join(data, "\n")))
					kind, data = "message", nil
				}
			}
			same(t, got, want, "by %s", readers[i])
		}
	}
}

// What /metrics says is read as a Prometheus reads it; nobody but this machine gets any of it.
func TestMetrics(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	c := newClient(t, r.room("-rate", "5", "CHAT_PASSWORD=geheim").joined().url)
	numbers := func(c *client) map[string]int {
		t.Helper()
		got := c.get("/metrics")
		same(t, got.header.Get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8", "Content-Type is")
		numbers, kinds := map[string]int{}, map[string]string{}
		help := ""
		for line := range strings.Lines(got.body) {
			if m := regexp.MustCompile(`^# HELP (chat_[a-z_]+) [A-Z].*\.\n$`).FindStringSubmatch(line); m != nil {
				help = m[1]
			} else if m := regexp.MustCompile(`^# TYPE (\w+) (counter|gauge)\n$`).FindStringSubmatch(line); m != nil &&
				m[1] == help && kinds[help] == "" && strings.HasSuffix(help, "_total") == (m[2] == "counter") {
				kinds[help] = m[2]
			} else if m := regexp.MustCompile(`^((\w+)(?:{\w+="\w+"})?) (\d+)\n$`).FindStringSubmatch(line); m != nil &&
				m[2] == help && kinds[help] != "" {
				if _, twice := numbers[m[1]]; twice {
					t.Errorf("%s comes twice", m[1])
				}
				numbers[m[1]], _ = strconv.Atoi(m[3])
			} else {
				t.Errorf("no Prometheus reads %q, after the help of %q", line, help)
			}
		}
		return numbers
	}
	c.do("POST", "/login", form("user", "小明", "password", "geheim"))
	c.post("one")
	c.post(" ")
	c.get("/stream?wait=0")
	eventually(t, "the poll's connection to be gone", func() bool { return numbers(c)["chat_readers"] == 0 })
	before := numbers(c)
	eventually(t, "a password to be refused", func() bool {
		return c.do("POST", "/login", form("user", "小明", "password", "wrong")).status == 429
	})
	dial(t, c.url)
	eventually(t, "one more connection", func() bool { return numbers(c)["chat_connections"] == before["chat_connections"]+1 })
	after := numbers(c)
	limit := after["chat_connections_limit"]
	expect(t, after["chat_redis_joined"] == 1 && limit > busyConns && after["chat_readers_limit"] == limit-limit/8 &&
		before[`chat_refused_total{what="passwords"}`] == 0 && after[`chat_refused_total{what="passwords"}`] == 1,
		"before: %v\nafter:  %v", before, after)
	for name, want := range map[string]int{`chat_posts_total{status="204"}`: 1, `chat_posts_total{status="422"}`: 1,
		"chat_messages_held": 1, "chat_messages_out_total": 1, "chat_redis_joins_total": 1, "chat_redis_writes_total": 0} {
		same(t, after[name], want, "%s", name)
	}
	n := after["chat_bytes_out_total"]
	expect(t, n >= 60 && n <= 80, "one message has %d bytes", n)
	c.stream("", "").until("ping")
	same(t, numbers(c)["chat_readers"], 1, "readers")
	r.kill()
	eventually(t, "Redis to be away", func() bool { return numbers(c)["chat_redis_joined"] == 0 })
	r.start()
	eventually(t, "the list to be written back", func() bool { return numbers(c)["chat_redis_writes_total"] == 1 })

	inMemory := numbers(newClient(t, startRoom(t).url))
	_, last := inMemory[`chat_refused_total{what="posts"}`]
	_, joined := inMemory["chat_redis_joined"]
	expect(t, last && !joined, "a room in memory tells %v", inMemory)

	s := newTestServer(t, &config{}, t.Logf)
	for _, test := range []struct {
		peer, via string
		status    int
	}{
		{"127.0.0.1", "", 200}, {"[::1]", "", 200}, {"192.0.2.1", "", 404},
		{"127.0.0.1", "X-Forwarded-For: 127.0.0.1", 404}, {"192.0.2.1", "X-Forwarded-For: 127.0.0.1", 404},
	} {
		w := s.ask("GET /metrics", "", test.peer, test.via)
		expect(t, w.Code == test.status && (w.Code != 404 || !strings.Contains(w.Body.String(), "chat_")),
			"to %s, %q: got %d %q, want %d", test.peer, test.via, w.Code, w.Body, test.status)
	}
}

// Every other method is 405, and HEAD answers at once: a long poll would take longer.
func TestOtherMethods(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url).login("小明")
	for path, allowed := range map[string]string{
		"/": "GET, HEAD", "/login": "GET, HEAD, POST", "/logout": "POST", "/post": "POST", "/stream": "GET, HEAD",
		"/stream?wait=25s": "GET, HEAD", "/lesson": "GET, HEAD", "/healthz": "GET, HEAD", "/metrics": "GET, HEAD", assetOf(c): "GET, HEAD",
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} {
			if !strings.Contains(allowed, method) {
				got := c.do(method, path, "")
				expect(t, got.status == 405 && got.header.Get("Allow") == allowed,
					"%s %s: got %d, Allow %q, want 405, %q", method, path, got.status, got.header.Get("Allow"), allowed)
			}
		}
		if !strings.Contains(allowed, "HEAD") {
			continue
		}
		conn := dial(t, c.url)
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(conn, raw("HEAD "+path+" HTTP/1.1", "Host: chat", "Connection: close", "Cookie: "+c.session().String()))
		got, err := io.ReadAll(conn)
		head, body, _ := strings.Cut(string(got), "\r\n\r\n")
		expect(t, err == nil && strings.HasPrefix(head, "HTTP/1.1 200 ") && body == "",
			"HEAD %s: got %q, %v, want 200 and no body at once", path, got, err)
	}
}

// linked finds what a page loads or leads to.
var linked = regexp.MustCompile(`(?:src|href)="?([^"\s>#?]+)`)

// assetOf is the path of an asset that the login page uses.
func assetOf(c *client) string {
	c.t.Helper()
	found := regexp.MustCompile(`assets/[^"\s>]*`).FindString(c.get("/login").body)
	require(c.t, found != "", "the login page uses no asset")
	return "/" + found
}

func TestPages(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url).login("小明")
	for _, page := range []string{"/", "/login", "/lesson"} {
		got := c.get(page)
		same(t, got.header.Get("Content-Type"), "text/html; charset=utf-8", "GET %s: Content-Type is", page)
		checkProtected(t, page, got)
		for _, found := range linked.FindAllStringSubmatch(got.body, -1) {
			to := "/" + strings.TrimPrefix(found[1], "./")
			linked := c.get(to)
			expect(t, linked.status == 200, "GET %s leads to %s, which is %d", page, to, linked.status)
			checkProtected(t, to, linked)
		}
	}
	checkProtected(t, "/assets/stream.js", c.get("/assets/stream.js")) // a worker obeys its own script's
	asset := assetOf(c)
	etag := c.get(asset).header.Get("ETag")
	got := c.get(asset, "If-None-Match: "+etag)
	expect(t, etag != "" && got.status == 304 && got.body == "", "GET %s with its ETag %q: got %d %q, want 304 and nothing", asset, etag, got.status, got.body)
	got = c.get(asset, `If-None-Match: "other"`)
	expect(t, got.status == 200 && got.body != "", "GET %s with another ETag: got %d %q, want it", asset, got.status, got.body)
}

// checkProtected sees that an answer bounds what a browser does with it.
func checkProtected(t *testing.T, path string, got response) {
	t.Helper()
	a, b := got.header.Get("X-Content-Type-Options"), got.header.Get("Referrer-Policy")
	expect(t, a == "nosniff" && b == "same-origin",
		"GET %s: X-Content-Type-Options is %q and Referrer-Policy %q, want nosniff and same-origin", path, a, b)
	policy := got.header.Get("Content-Security-Policy")
	for _, want := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'",
		"connect-src 'self'", "worker-src 'self'", "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'",
		"require-trusted-types-for 'script'"} {
		expect(t, strings.Contains(policy, want), "GET %s: the policy %q lacks %q", path, policy, want)
	}
}

func TestLoginForm(t *testing.T) {
	t.Parallel()
	open := newClient(t, startRoom(t).url)
	closed := newClient(t, startRoom(t, "CHAT_PASSWORD=geheim").url)
	for _, c := range []*client{open, closed} {
		body := c.get("/login").body
		expect(t, strings.Contains(body, `name="user"`) && strings.Contains(body, `name="password"`) == (c == closed),
			"in a closed room (%v) the form is %s", c == closed, body)
	}
	for _, test := range []struct {
		name   string
		c      *client
		body   string
		status int
		kept   string // stands in the form that comes back
	}{
		{"a good name", open, form("user", "小明"), 303, ""},
		{"a name with a colon", open, form("user", "a:b"), 422, `value="a:b"`},
		{"a name of markup, refused, is kept as text", open, form("user", `"><b>:`), 422, `value="&#34;&gt;&lt;b&gt;:"`},
		{"the reason has the character", open, form("user", "Мs Wang"), 422, "U&#43;041C &#39;М&#39; cannot be used in this name."},
		{"the next reason has its own", open, form("user", "a:b"), 422, "U&#43;003A &#39;:&#39; cannot be used in this name."},
		{"no name", open, "", 422, `name="user"`},
		{"the right password", closed, form("user", "小明", "password", "geheim"), 303, ""},
		{"a wrong password", closed, form("user", "小明", "password", "Geheim"), 403, `value="小明"`},
		{"no password", closed, form("user", "小明"), 403, `value="小明"`},
		{"a bad name and the right password", closed, form("user", "a:b", "password", "geheim"), 422, `value="a:b"`},
	} {
		got := test.c.do("POST", "/login", test.body)
		expect(t, got.status == test.status && strings.Contains(got.body, test.kept),
			"%s: got %d and the form %q, want %d with %q", test.name, got.status, got.body, test.status, test.kept)
		cookie := got.header.Get("Set-Cookie")
		expect(t, (cookie != "") == (test.status == 303), "%s: got status %d with the cookie %q", test.name, got.status, cookie)
		expect(t, !strings.Contains(got.body, "geheim") && !strings.Contains(got.body, "Geheim"), "%s: the form repeats the password", test.name)
	}
	markup := newClient(t, open.url).login(`"><script>x</script>`) // on a page a name is text
	page := markup.get("/").body
	expect(t, !strings.Contains(page, "<script>x") && strings.Contains(page, "&lt;script&gt;x"), "a name of markup is not escaped in %s", page)
}

func TestSessionCookie(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url)
	got := c.cookie("/login", form("user", "小明"))
	expect(t, got.HttpOnly && got.SameSite == http.SameSiteLaxMode && got.Path == "/" && got.Domain == "" && !got.Secure,
		"got %v, want HttpOnly, SameSite=Lax, Path=/, and neither Domain nor Secure", got)
	same(t, got.MaxAge, 30*24*60*60, "the browser keeps the cookie for")
	again := c.cookie("/login", form("user", "小明"))
	expect(t, again.Value != got.Value, "two sessions have one cookie")
	expect(t, c.cookie("/login", form("user", "小明"), "X-Forwarded-Proto: https").Secure, "behind TLS the cookie is not Secure")
	gone := c.cookie("/logout", "")
	expect(t, gone.Name == got.Name && gone.MaxAge < 0, "logging out sets %v, want %s gone", gone, got.Name)
}

func TestWhatEndsSessions(t *testing.T) {
	t.Parallel()
	member := newClient(t, startRoom(t, "CHAT_KEY=one key").url).login("小明")
	for _, test := range []struct {
		name string
		env  []string
		want int
	}{
		{"a restart with the same key keeps them", []string{"CHAT_KEY=one key"}, 204},
		{"another key", []string{"CHAT_KEY=another"}, 401},
		{"a restart without a key", nil, 401},
		{"a password is set", []string{"CHAT_KEY=one key", "CHAT_PASSWORD=geheim"}, 401},
	} {
		same(t, member.at(startRoom(t, test.env...).url).post("hello"), test.want, "%s", test.name)
	}
}

// TestBadCookies changes a session in every way it can think of. Each is 401: neither a
// session nor, silently, somebody anonymous.
func TestBadCookies(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t, "CHAT_KEY=one key").url)
	c := newClient(t, w.c.url).login("小明")
	good := c.session()
	bad := func(value string) string { return good.Name + "=" + value }
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/=.%"
	var values []string
	for i, was := range good.Value {
		cut, rest := good.Value[:i], good.Value[i+1:]
		values = append(values, cut, cut+rest) // cut here, and with one character missing
		others := "A1-." + string(was^1) + string(was^0x20)
		if rest == "" || strings.ContainsAny(rest[:1], ".|:~") {
			others = alphabet // the last character of a part may have bits that decode to nothing
		}
		for _, other := range others {
			if other != was && strings.ContainsRune(alphabet, other) {
				values = append(values, cut+string(other)+rest)
			}
		}
	}
	other := newClient(t, startRoom(t, "CHAT_KEY=another key").url).login("小明")
	closed := newClient(t, startRoom(t, "CHAT_KEY=one key", "CHAT_PASSWORD=x").url)
	closed.do("POST", "/login", form("user", "小明", "password", "x"))
	values = append(values, "x", "....", "%00", good.Value+".", good.Value+"A", good.Value+"=", good.Value+good.Value,
		strings.ToUpper(good.Value), strings.ToLower(good.Value), strings.Repeat("A", 10<<10),
		other.session().Value, closed.session().Value)
	slices.Sort(values)
	stranger := newClient(t, w.c.url)
	for _, value := range slices.Compact(values) {
		same(t, stranger.post("forged", "Cookie: "+bad(value)), 401, "the cookie %.300q instead of %q", value, good.Value)
		same(t, stranger.get("/", "Cookie: "+bad(value)).status, 303, "the page with the cookie %.300q", value)
	}
	c.do("POST", "/logout", "")
	c.say("logged out")
	said := []string{"anonymous: logged out"}
	for _, test := range []struct {
		name, cookie string
		status       int
		as           string
	}{
		{"the good one", good.String(), 204, "小明"},
		{"two, the bad one first", bad("x") + "; " + good.String(), 204, "小明"},
		{"two, the good one first", good.String() + "; " + bad("x"), 204, "小明"},
		{"a thousand bad ones and a good one", strings.Repeat(bad("x")+"; ", 1000) + good.String(), 204, "小明"},
		{"a thousand bad ones", strings.Repeat(bad("x")+"; ", 1000), 401, ""},
		{"5000 of them are too much of a header", strings.Repeat(bad("xxxxxxxx")+"; ", 5000), 431, ""},
		{"one of somebody else is not ours", "theirs=1", 204, "anonymous"},
		{"a name in other letters is not ours", strings.ToUpper(good.String()[:1]) + good.String()[1:], 204, "anonymous"},
		{"a name that only begins like ours is not ours", good.Name + "x=" + good.Value, 204, "anonymous"},
		{"a cookie that is nonsense is not ours", `;;; =; "; \`, 204, "anonymous"},
	} {
		same(t, stranger.post(test.name, "Cookie: "+test.cookie), test.status, "cookies: %s", test.name)
		if test.as != "" {
			said = append(said, test.as+": "+test.name)
		}
	}
	w.heard(said...)
}

// TestPostChecksInOrder gives each request two faults; the one that is checked first decides.
func TestPostChecksInOrder(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t, "-rate", "0.01").url) // who is too fast stays so
	member, fast := newClient(t, w.c.url).login("小明"), newClient(t, w.c.url).login("小红")
	var said []string
	for i := range 40 {
		if fast.postKey(fmt.Sprintf("%s%04d", keyA, i), "quick") == 204 {
			said = append(said, "小红: quick")
		}
	}
	const plain, crossSite, known = "Content-Type: text/plain", "Sec-Fetch-Site: cross-site", "Idempotency-Key: " + keyA + "0000"
	broken := "Cookie: " + member.session().Name + "=broken"
	letters := func(n int) string { return form("message", strings.Repeat("字", n)) }
	for _, test := range []struct {
		name    string
		who     *client
		method  string
		body    string
		headers []string
		status  int
	}{
		{"another method, cross-site", member, "PUT", "", []string{crossSite}, 405},
		{"cross-site, a broken session", w.c, "POST", "message=x", []string{crossSite, broken}, 403},
		{"a broken session, another type", w.c, "POST", "message=x", []string{broken, plain}, 401},
		{"another type, too big", member, "POST", "message=" + strings.Repeat("x", 70<<10), []string{plain}, 415},
		{"too big, broken escapes", member, "POST", "message=%zz" + strings.Repeat("x", 70<<10), nil, 413},
		{"broken escapes, no message", member, "POST", "x=%zz", nil, 400},
		{"a bad key, no message", member, "POST", "", []string{"Idempotency-Key: short"}, 400},
		{"an empty key, a blank message", member, "POST", "message=+", []string{"Idempotency-Key:"}, 400},
		{"not UTF-8, too long", member, "POST", letters(4001) + "%ff", nil, 422},
		{"too long, a known key", fast, "POST", letters(4001), []string{known}, 413},
		{"blank, a known key", fast, "POST", "message=", []string{known}, 422},
		{"a known key, too fast", fast, "POST", "message=again", []string{known}, 204},
		{"too fast", fast, "POST", "message=more", nil, 429},
	} {
		got := test.who.do(test.method, "/post", test.body, test.headers...)
		id := got.header.Get("Message-Id")
		expect(t, got.status == test.status && (id != "") == (test.status == 204),
			"%s: got %d, Message-Id %q, want %d", test.name, got.status, id, test.status)
		expect(t, got.retryAfter() == (test.status == 429), "%s: got %d with Retry-After %q", test.name, got.status, got.header.Get("Retry-After"))
	}
	w.heard(said...)
}

// TestMessages posts forms and looks at what of them is in the room.
func TestMessages(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t).url)
	c := newClient(t, w.c.url).login("小明")
	var said []string
	try := func(status int, body, heard string, headers ...string) {
		t.Helper()
		if got := c.do("POST", "/post", body, headers...); got.status != status {
			t.Errorf("%.80q, %q: got %d, want %d", body, headers, got.status, status)
		} else if status == 204 {
			said = append(said, "小明: "+heard)
		}
	}
	text := func(s string) string { return form("message", s) }
	long := strings.Repeat
	const formType = "application/x-www-form-urlencoded"
	for kind, status := range map[string]int{formType: 204, strings.ToUpper(formType): 204, formType + "; charset=UTF-8": 204, formType + "; charset": 204,
		"": 415, "text/plain": 415, "application/json": 415, "multipart/form-data; boundary=x": 415, formType + "x": 415, "///": 415} {
		try(status, "message=a", "a", "Content-Type: "+kind)
	}
	try(204, "message=if (x) y; z", "if (x) y; z") // as curl -d sends it
	padded := "message=x&pad=" + long("x", 64<<10-len("message=x&pad="))
	try(204, padded, "x")
	for status, bodies := range map[int][]string{
		400: {"message=%", "message=%4", "message=%zz", "message=%u4f60", "message=a&x=%zz", "message=a&%zz=x"},
		413: {padded + "x", text(long("字", 4001)), text("a" + long("\u0301", 4000))},
		422: {"", "text=a", "message", "message=", "MESSAGE=a", "message=a%ff", "message=a\xff",
			"message=%e4%bd" /* cut */, "message=a%c0%80" /* NUL in two bytes */, "message=a%ed%a0%80" /* a surrogate */, "message=a%f4%90%80%80"},
	} {
		for _, body := range bodies {
			try(status, body, "")
		}
	}
	blanks := []string{" ", "\t", "\n", "\r\n \r", "\x00", "\x7f", "\u0085", "\u00a0", "\u00ad", "\u034f", "\u061c",
		"\u115f", "\u1160", "\u1680", "\u180e", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
		"\u2007", "\u2008", "\u2009", "\u200a", "\u200b", "\u200c", "\u200d", "\u200e", "\u200f", "\u2028", "\u2029",
		"\u202a", "\u202e", "\u202f", "\u205f", "\u2060", "\u2064", "\u2066", "\u206f", "\u2800", "\u3000", "\u3164",
		"\ufe00", "\ufe0f", "\ufeff", "\uffa0", "\U000e0001", "\U000e0020", "\U000e007f", "\U000e0100"}
	for _, blank := range append(blanks, strings.Join(blanks, "")) {
		try(422, text(blank), "")
	}
	for _, same := range []string{long("x", 4000), long("😀", 4000), "a" + long("\u0301", 3000), "  a\tb ", "שלום", "👩\u200d👧 ❤\ufe0f 🇨🇳", "!gap",
		`<script>alert(1)</script>&amp;"'`, "a\nb", "a\nid: 0\nevent: gap\nretry: 1\ndata: b", "a\n\nevent: gap\ndata:\n\ndata: b",
		"a\n[12:34:56] 小红: b", "a\n: b\n:", "a\n\ufeffid: 0"} {
		try(204, text(same), same)
	}
	for in, out := range map[string]string{
		long("x", 3998) + "\r\ny\x00\x01": long("x", 3998) + "\ny", // 4000 after cleaning
		"a\x00b":                          "ab", "a\x01\x08\x1b[31m\x7f\u0080\u009fb": "a[31mb", "a\x1c\x1d\x1e\x1fb": "ab",
		"a\u202a\u202b\u202c\u202d\u202eb": "ab", "a\u2066\u2067\u2068\u2069b": "ab", "a\u200e\u200f\u061cb": "ab",
		"a\r\nb": "a\nb", "a\rb": "a\nb", "a\n\rb": "a\n\nb", "a\r\rb\r\n\nc": "a\n\nb\n\nc", "a\v\f\u0085\u2028\u2029b": "a\n\n\n\n\nb",
		"a\rid: 0\revent: gap\rretry: 1\rdata: b":               "a\nid: 0\nevent: gap\nretry: 1\ndata: b",
		"a\r\n\r\nid: 0\r\nevent: ping\r\ndata:\r\n\r\ndata: b": "a\n\nid: 0\nevent: ping\ndata:\n\ndata: b",
		"a\u2029\u2029id: 0\u2029data: b\u2029\u2029":           "a\n\nid: 0\ndata: b\n\n",
		"a\x00\n\x00id: 0\ndata: b":                             "a\nid: 0\ndata: b",
	} {
		try(204, text(in), out)
	}
	w.heard(said...)
}

func TestKeys(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t).url)
	c := newClient(t, w.c.url).login("小明")
	k := strings.Repeat("k", 64)
	for _, bad := range []string{"", k[:15], k + "k", strings.Repeat(k, 80), "kkkkkkkk kkkkkkkk", "kkkkkkkk\tkkkkkkkk", unknownID, keyA + ".abcdefgh",
		`"8e03978e-40d5-43dd-bc93-6894a57f9324"`, keyA + "," + keyB, "kkkkkkkk/kkkkkkkk", "ключключключключ", "٠١٢٣٤٥٦٧٠١٢٣٤٥٦٧", keyA + "\xff"} {
		same(t, c.postKey(bad, "bad"), 400, "the key %.99q", bad)
	}
	for _, good := range []string{k[:16], k, "ABCXYZabcxyz0189_-", "abcxyzabcxyz0189_-"} { // in small letters it is another
		id := c.sayAs(good, good)
		again := w.c.sayAs(good, "another text by another person")
		expect(t, again == id && anyID.MatchString(id), "the message has the id %q, and posted again %q", id, again)
		e := w.message()
		expect(t, e.id == id && e.said() == "小明: "+good, "got %v, want the first message, under the id %s", e, id)
	}
	together(20, func(int) { c.sayAs(keyA, "pressed twenty times") })
	drawn := c.do("POST", "/post", "message=without+a+key").header.Get("Message-Id")
	w.hears("小明: pressed twenty times")
	e := w.message()
	expect(t, drawnID.MatchString(drawn) && e.id == drawn && e.said() == "小明: without a key", "got %v, want the second message under the drawn id %q", e, drawn)
	w.heard()
}

// TestNames logs in under each name and, if it is let in, speaks.
func TestNames(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t).url)
	var said []string
	try := func(user, shown, reason string) {
		t.Helper()
		name, why := cleanName(user)
		expect(t, name == shown && why == reason, "the name %+.40q: got %q, %q, want %q, %q", user, name, why, shown, reason)
		c := newClient(t, w.c.url)
		got := c.do("POST", "/login", form("user", user))
		want := map[bool]int{false: 303, true: 422}[shown == ""]
		require(t, got.status == want, "the name %+.40q: got %d, want %d", user, got.status, want)
		if cookie := got.header.Get("Set-Cookie"); strings.ContainsFunc(cookie, func(r rune) bool { return r > '~' }) || (cookie == "") != (shown == "") {
			t.Errorf("the name %+.40q: got %d with the cookie %q", user, got.status, cookie)
		}
		if shown != "" {
			c.say("hello")
			said = append(said, shown+": hello")
		}
	}
	for _, name := range []string{"小明", "Анна", "عمر", "ก\u0e31\u0e49น", "小明 Анна Ω", "O'Neil-Smith (2)", "<b>&amp;", `"><script>`, "7", "+",
		"😀", "🇨🇳", "a\u0301\u0323\u05b0", "e\u0301\u0302\u0303e\u0301", strings.Repeat("字", 24)} {
		try(name, name, "")
	}
	for user, shown := range map[string]string{"👩\u200d🚀": "👩🚀", "❤\ufe0f": "❤", " \u3000x\u00a0": "x", "a \u3000\u00a0 \tb": "a b",
		"a\v\fb\u0085c\u2028\u2029d\r\ne": "a b c d e", " " + strings.Repeat("😀\ufe0f", 24): strings.Repeat("😀", 24)} {
		try(user, shown, "")
	}
	for _, user := range []string{strings.Repeat("字", 25), "a" + strings.Repeat("\u0301", 24), strings.Repeat("字", 5000)} {
		try(user, "", "name_long")
	}
	for _, user := range []string{"", " ", " \u3000\t", "\u200d\ufe0f", "...!?-", "\u0301"} {
		try(user, "", "name_empty")
	}
	// Controls, formats and what shows nothing, of every kind; the line's own grammar; private, not assigned.
	for _, r := range ":[]\x00\x1b\x1c\x1e\x7f\u009b\u00ad\u034f\u061c\u0600\u115f\u3164\uffa0\u17b4\u180b\u180e\u200b\u200c\u200e\u202e\u2066\u2060" +
		"\u2064\u2800\ufe00\ufeff\ufff9\ufffc\uffff\u0378\ue000\U00013441\U0001d159\U0001d173\U000e0041\U000e01ef" {
		try(fmt.Sprintf("a%cb", r), "", fmt.Sprintf("name_chars %#U", r))
	}
	for user, r := range map[string]rune{"Мs Wang": 'М', "Ms Wаng": 'а', "Μs Wang": 'Μ', "a\u0301\u0302\u0303\u0304": '\u0304', "x: [12:34:56] y": ':',
		"x\r\nSet-Cookie: evil=1": ':', "🏴\U000e0067\U000e0062\U000e007f": '\U000e0067', "a\xffb": '\ufffd', "a\xed\xa0\x80b": '\ufffd'} {
		reason := fmt.Sprintf("name_chars %#U", r)
		if r == '\ufffd' {
			reason = "name_chars U+FFFD"
		}
		try(user, "", reason)
	}
	w.heard(said...)
}

// TestBadRequests sends what no HTTP client would. Many of the answers are net/http's own.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	room := startRoom(t)
	w := newWitness(t, room.url)
	try := func(status int, location, request string) {
		t.Helper()
		got := rawRequest(t, room.url, request)
		expect(t, got.status == status && got.header.Get("Location") == location,
			"%.80q: got %d, Location %q, want %d, %q", request, got.status, got.header.Get("Location"), status, location)
	}
	pad := strings.Repeat("x", 15<<10)
	for target, status := range map[string]int{
		"*": 400, "login": 400, "/%zz": 400, "/%4": 400, "/\x00": 400, "/\x01": 400, "/log in": 400,
		"/%00": 404, "/login%00": 404, "/assets/%00": 404, "/login%2f": 404, "/登录": 404, "/\xff%ff": 404, "/login;x=1": 404,
		"/assets/%2e%2e/main.go": 404, `/assets/..\main.go`: 404, "/assets/..%2fmain.go": 404, "/" + pad: 404, "/" + pad + pad: 431,
		"/lo%67in": 200, "/login?user=%zz": 200, "http://other.example/login": 200,
	} {
		try(status, "", rawGet(target))
	}
	for target, location := range map[string]string{"/assets/../main.go": "/main.go", "/../../../etc/passwd": "/etc/passwd", "//login": "/login",
		"//evil.example/..": "/", "//evil.example/../x": "/x", "/assets//x": "/assets/x"} { // none leads to another host
		try(307, location, rawGet(target))
	}
	for line, status := range map[string]int{
		"get /healthz HTTP/1.1": 405, "BREW / HTTP/1.1": 405, "TRACE / HTTP/1.1": 405, "CONNECT /post HTTP/1.1": 405, "OPTIONS * HTTP/1.1": 200,
		"G@T / HTTP/1.1": 400, " / HTTP/1.1": 400, "": 400, "GET /": 400, "GET / HTTP/one": 400, "GET / HTTP/9.9": 505, pad + pad + " / HTTP/1.1": 431,
	} {
		try(status, "", raw(line, "Host: chat"))
	}
	for headers, status := range map[string]int{
		"": 400, "Host: a\r\nHost: b": 400, "Host: a b": 400, "Host:": 200, // none, two …
		"Host: chat\r\nnonsense": 400, "Host: chat\r\nA B: x": 400, "Host: chat\r\nCookie : x": 400, "Host: chat\r\n: x": 400,
		"Host: chat\r\nX: \x00": 400, "Host: chat\r\nX: 你好\xff": 200, " x: y\r\nHost: chat": 400,
		"Host: chat\r\nX: " + pad: 200, "Host: chat\r\nX: " + pad + pad: 431,
		"Host: chat" + strings.Repeat("\r\nX: 0123456789012345678901234567890", 1000): 431, "Host: chat\r\nExpect: nonsense": 417,
	} {
		try(status, "", raw(strings.TrimSuffix("GET /healthz HTTP/1.1\r\n"+headers, "\r\n")))
	}
	try(200, "", raw("GET /healthz HTTP/1.0"))
	try(200, "", "GET /healthz HTTP/1.1\nHost: chat\n\n")
	try(400, "", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n") // a TLS hello
	for _, header := range []string{"Connection: Upgrade\r\nUpgrade: websocket", "Range: bytes=0-0", "Content-Length: 0"} {
		try(200, "", raw("GET /stream?wait=0 HTTP/1.1", "Host: chat", header))
	}
	try(200, "", raw("GET /stream?wait=0 HTTP/1.1", "Host: chat", "Content-Length: 3")+"abc")
	for length, status := range map[string]int{"-9": 400, "+9": 400, "nine": 400, "99999999999999999999": 400, "9\r\nContent-Length: 8": 400} {
		try(status, "", rawPost("message=x", "Content-Length: "+length))
	}
	try(422, "", rawPost("message=x")) // no length
	try(415, "", raw("POST /post HTTP/1.1", "Host: chat", "Content-Length: 9")+"message=x")
	try(501, "", rawPost("message=x", "Transfer-Encoding: gzip"))
	try(501, "", rawPost("message=x\r\n0\r\n\r\n", "Transfer-Encoding: chunked, chunked"))
	for chunks, status := range map[string]int{"message=x": 400, "-9\r\nmessage=x": 400, "10000000000000000\r\nmessage=x": 400, "5\r\nmessage=x": 400,
		"11170\r\nmessage=" + strings.Repeat("x", 70000-8): 413} {
		try(status, "", rawPost(chunks+"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"))
	}
	w.heard()
	room.changed() // and nothing of it is logged
}

// TestUnfinishedRequests: a request that stops halfway is no message and holds up nobody.
// TestConnectionsInTime says how long it may stay.
func TestUnfinishedRequests(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t).url)
	for name, request := range map[string]string{
		"half a request line":   "POST /po",
		"half a header":         "POST /post HTTP/1.1\r\nHost: chat\r\nContent-Le",
		"a header without body": rawPost("", "Content-Length: 9"),
		"half a body":           rawPost("message=half", "Content-Length: 13"),
		"half a chunk":          rawPost("13\r\nmessage=half", "Transfer-Encoding: chunked"),
		"a body of 1 TB":        rawPost("message=", "Content-Length: 1099511627776"),
		"no last chunk":         rawPost("c\r\nmessage=half\r\n", "Transfer-Encoding: chunked"),
	} {
		for _, end := range []func(*net.TCPConn){
			func(*net.TCPConn) {}, // silence
			func(conn *net.TCPConn) {
				conn.CloseWrite()
				got, _ := io.ReadAll(conn)
				refused := strings.HasSuffix(string(got), "\r\n\r\nthe form did not arrive whole\n")
				expect(t, !strings.Contains(string(got), " 204 ") && (!strings.Contains(request, "\r\n\r\n") || refused),
					"%s and then an end: got %q", name, got)
			},
			func(conn *net.TCPConn) { conn.SetLinger(0); conn.Close() },
		} {
			conn := dial(t, w.c.url).(*net.TCPConn)
			conn.SetDeadline(time.Now().Add(patience))
			io.WriteString(conn, request)
			end(conn)
		}
	}
	w.heard()
}

// TestOrigins tries every combination of what a browser says about where a form came from.
func TestOrigins(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t).url)
	host := strings.TrimPrefix(w.c.url, "http://")
	const trusted, another = "https://chat.example", "http://192.0.2.1:8080"
	trusting := w.c.at(startRoom(t, "-origin", another, "-origin", "HTTPS://Chat.Example:443/").url)
	sites := map[string]string{"": "by origin", "same-origin": "ours", "none": "ours",
		"same-site": "theirs", "cross-site": "theirs", "nonsense": "theirs"}
	origins := map[string]string{"": "ours", "http://" + host: "ours", "https://" + host: "ours", "null": "theirs",
		"http://evil.example": "theirs", "http://127.0.0.1": "theirs", "http://" + host + ".evil.example": "theirs",
		"nonsense": "theirs", trusted: "trusted", another: "trusted"}
	var said []string
	for site, bySite := range sites {
		for origin, byOrigin := range origins {
			var headers []string
			if site != "" {
				headers = append(headers, "Sec-Fetch-Site: "+site)
			}
			if origin != "" {
				headers = append(headers, "Origin: "+origin)
			}
			ours := bySite == "ours" || bySite == "by origin" && byOrigin == "ours"
			for _, request := range []struct {
				path, body string
				status     int
			}{{"/post", form("message", "from here"), 204}, {"/login", form("user", "x"), 303}, {"/logout", "", 303}} {
				want := request.status
				if !ours {
					want = 403
				}
				got := w.c.do("POST", request.path, request.body, headers...)
				expect(t, got.status == want && strings.Contains(got.body, "with -origin") == (want == 403),
					"POST %s with %q: got %d %q, want %d, and if it is refused a hint at -origin", request.path, headers, got.status, got.body, want)
			}
			if ours {
				said = append(said, "anonymous: from here")
			}
			if got := trusting.post("x", headers...); byOrigin == "trusted" && got != 204 || byOrigin == "theirs" && bySite != "ours" && got != 403 {
				t.Errorf("posting with %q where -origin is %s and %s: got %d", headers, trusted, another, got)
			}
			got := w.c.get("/stream?wait=0", headers...)
			expect(t, got.status == 200 && got.header.Get("Access-Control-Allow-Origin") == "", "GET /stream with %q: got %d with %v", headers, got.status, got.header)
		}
	}
	w.heard(said...)
}

func TestMessageFrame(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url).login("小明")
	before := time.Now().Truncate(time.Second)
	id := c.sayAs(keyA, "one\r\ntwo\n\n event: gap\rid: 0")
	got := c.get("/stream?wait=0")
	frame := regexp.MustCompile(`^retry: 2000\nid: ` + id + `\ndata: \[(\d\d:\d\d:\d\d)\] 小明: one\ndata: two\ndata: \ndata:  event: gap\ndata: id: 0\n\n`)
	found := frame.FindStringSubmatch(got.body)
	require(t, found != nil, "got %q, want retry in the block of the message, its id, and a data line for each line", got.body)
	for now := before; found[1] != now.Format(time.TimeOnly); now = now.Add(time.Second) {
		if now.After(time.Now()) {
			t.Errorf("the message is of %s, want %s", found[1], before.Format(time.TimeOnly))
			break
		}
	}
	for name, want := range map[string]string{
		"Content-Type":           "text/event-stream; charset=utf-8",
		"X-Content-Type-Options": "nosniff",
		"Cache-Control":          "no-store, no-transform",
		"X-Accel-Buffering":      "no",
	} {
		live := c.stream("", "").header.Get(name)
		expect(t, got.header.Get(name) == want && live == want,
			"%s: got %q polling and %q streaming, want %q", name, got.header.Get(name), live, want)
	}
}

// TestResume asks for what follows an id, in every way to receive.
func TestResume(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t, "-history", "2").url)
	same(t, c.stream("", "").next(patience).in(), "ping 0: ", "an empty room starts with")
	waiting := c.stream("wait=25s", "0")
	waiting.until("ping")
	a, b, d := c.sayAs(keyA, "1"), c.sayAs(keyB, "2"), c.sayAs(keyA+"3", "3")
	got := tell(waiting.until("end"))
	expect(t, got[0] == "1" && got[len(got)-2] == "(ping)", "a long poll that waited gets %q, want the first message and a ping", got)
	retries := map[string]map[int]bool{"": {}, "wait=0": {}, "wait=25s": {}}
	try := func(query, header, want string) {
		t.Helper()
		for way, seen := range retries {
			if way == "wait=25s" && want == "(ping)" {
				continue // holds on
			}
			last := "end"
			if way == "" {
				last = "ping"
			}
			s := c.stream(strings.Trim(way+"&"+query, "&"), header)
			all := s.until(last)
			got := strings.TrimSuffix(strings.Join(tell(all), " "), " (end)")
			expect(t, s.status == 200 && got == want,
				"/stream?%.99s with %s after %.99q: got %d, %q, want %q", query, way, header, s.status, got, want)
			same(t, all[slices.IndexFunc(all, func(e event) bool { return e.kind == "ping" })].id, d,
				"/stream?%.99s with %s after %.99q: the ping has the id", query, way, header)
			if s.close(); len(all[0].retry) == 1 {
				seen[all[0].retry[0]] = true
			}
		}
	}
	try("", "", "2 3 (ping)") // a newcomer
	try("", " ", "2 3 (ping)")
	try("after=", "", "2 3 (ping)")
	try("", "0", "1 2 3 (ping)")
	try("after=0", "", "1 2 3 (ping)")
	try("", a, "2 3 (ping)")
	try("", b, "3 (ping)")
	try("", d, "(ping)")
	try("after="+b, "", "3 (ping)")
	try("after="+a, d, "(ping)") // the header wins
	try("after="+d, unknownID, "(gap) 2 3 (ping)")
	try("", b+".abcdefgh", "3 (ping)") // a foreign line that is not here
	for _, lost := range []string{unknownID, keyB + "~aaaaaaaa", keyB, strings.ToUpper(b), b + "x", b + ".", b + ".1234567!", ".", "你好", "\xff\xfe",
		"42", "-1", "00", strings.Repeat("x", 5<<10)} {
		try("", lost, "(gap) 2 3 (ping)")
	}
	for _, lost := range []string{unknownID, "\x00", strings.Repeat("x", 10<<10), b + "\nevent: evil\ndata: x\n\n", "\revent: evil\rdata: x\r\r"} {
		try("after="+url.QueryEscape(lost), "", "(gap) 2 3 (ping)")
	}
	for way, want := range map[string][3]int{"": {1000, 4000, 20}, "wait=0": {2000, 2000, 1}, "wait=25s": {200, 400, 15}} {
		seen := slices.Sorted(maps.Keys(retries[way]))
		expect(t, len(seen) >= want[2] && seen[0] >= want[0] && seen[len(seen)-1] <= want[1],
			"/stream?%s: readers come back after %d ms, want %d to %d, each for itself", way, seen, want[0], want[1])
	}
	if got := c.get("/stream?wait=0", "Last-Event-ID: "+a, "Last-Event-ID: "+b); got.status != 200 || !strings.Contains(got.body, "event: ping") {
		t.Errorf("two headers: got %d, %q, want a whole answer", got.status, got.body)
	}
	none := newClient(t, startRoom(t, "-history", "0").url)
	id := none.sayAs(keyA, "one")
	same(t, none.stream("", "").next(patience).in(), "ping "+id+": ", "a newcomer without history gets")
	for query, want := range map[string]int{
		"wait=0": 200, "wait=0s": 200, "wait=1ms": 200, "wait=0.01s": 200, "wait=1h": 200, "wait=2000000h": 200,
		"wait=": 400, "wait=-1s": 400, "wait=-1ns": 400, "wait=5": 400, "wait=soon": 400, "wait=1e3s": 400,
		"wait=99999999999999999999h": 400, "wait=NaN": 400, "wait=%00": 400, "after=%zz": 400,
	} {
		same(t, c.stream(query, "").status, want, "/stream?%s", query)
	}
}

// TestNewest4096 looks at both sides of the end of what a room remembers. Who posts an old key again
// does not move the place of a reader who sleeps there.
func TestNewest4096(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url)
	first, second := c.sayAs(keyA, "the first"), c.sayAs(keyB, "the second")
	c.sayMany(4095, "")
	got := heard(c.poll(second))
	expect(t, c.sayAs(keyB, "again") == second && len(got) == 4095,
		"behind the oldest of 4096 messages came %d, want 4095, and it is known", len(got))
	moved := c.sayAs(keyA, "a forgotten key")
	for _, cursor := range []string{first, "0"} {
		if got := heard(c.poll(cursor)); moved == first || len(got) != 201 || got[0] != "(gap)" || got[200] != "a forgotten key" {
			t.Errorf("at %s, behind 4098 messages the last of which has the id %s, came %d words from %s on, want a gap and 200 up to the last", cursor, moved, len(got), got[0])
		}
	}
}

// The same with Redis, whose list still has the first message of that key.
func TestSleepersPlace(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	c := newClient(t, r.room().url)
	place := c.sayAs(keyA, "good night")
	r.announce(4207)
	c.insist("dawn") // behind so many lines it may take a busy machine over confirmTimeout
	moved := c.sayAs(keyA, "good morning")
	expect(t, moved != place, "the key that is forgotten has the id %s again", moved)
	if got := c.stream("", place).upTo("good morning"); len(got) != 201 || got[0] != "(gap)" {
		t.Errorf("a sleeper gets %d lines, %q first, want a gap and what a newcomer gets", len(got), got[0])
	}
}

// TestShutdown has many streams open: each is told when to come back, and not all at once.
func TestShutdown(t *testing.T) {
	t.Parallel()
	r := startRoom(t)
	c := newClient(t, r.url)
	id := c.sayAs(keyA, "hello")
	var open []*answer
	for i := range 100 {
		s := c.stream([]string{"wait=60s", "", "", ""}[i%4], id)
		s.until("ping")
		open = append(open, s)
	}
	same(t, r.stop(), nil, "with 100 streams open it ended with")
	seen, told := map[int]bool{}, map[bool]int{} // true: polls
	for i, s := range open {
		last := s.until("end")
		if len(last) < 2 || last[len(last)-2].retry == nil {
			continue // cut off: a busy machine may take over stopTimeout
		}
		told[i%4 == 0]++
		e := last[len(last)-2] // in the block of an event, or some clients would take it for a message
		require(t, e.kind == "ping" && e.id == id && len(e.retry) == 1 && e.retry[0] >= 1000 && e.retry[0] <= 4000,
			"a stream ended with %v, want a ping of %s with a retry of 1000 to 4000", last, id)
		seen[e.retry[0]] = true
	}
	expect(t, told[true] >= 5 && told[false] >= 25, "%d of 25 polls and %d of 75 streams were told when to come back", told[true], told[false])
	expect(t, len(seen) >= 25, "100 readers come back at %d different times", len(seen))
}

// TestSignals: neither a stream nor a request that is not all there holds up the end. Who does not want
// to wait for it signals again.
func TestSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no signals")
	}
	t.Parallel()
	for _, name := range []string{"TERM", "INT"} {
		p := startProcess(t)
		s := newClient(t, p.url).stream("", "")
		s.until("ping")
		halfPost(t, p.url, "message=x")
		start := time.Now()
		p.signal(name)
		err := p.wait(patience)
		expect(t, err == nil && time.Since(start) <= 10*time.Second,
			"SIG%s with requests open: %v after %v, want exit status 0 at once", name, err, time.Since(start))
		s.until("end")
	}
	eventually(t, "it to end by a second signal", func() bool {
		p := startProcess(t)
		halfPost(t, p.url, "message=x") // holds the end up for stopTimeout, in which the signal must come
		for {
			p.interrupt()
			select {
			case <-p.ended:
				exit, ok := errors.AsType[*exec.ExitError](p.err)
				return ok && exit.ExitCode() == -1
			case <-time.After(time.Millisecond):
			}
		}
	})
}

// halfPost makes the server wait for the body of a post, and returns the connection and what
// reads from it.
func halfPost(t testing.TB, url, body string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn := dial(t, url)
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, rawPost("", fmt.Sprint("Content-Length: ", len(body)), "Expect: 100-continue"))
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	require(t, err == nil && resp.StatusCode == http.StatusContinue, "half a post is answered %v, %v, want to be continued", resp, err)
	return conn, in
}

// TestRate has one sender post as fast as it can while another one is heard. What is refused, or no
// message, costs nothing.
func TestRate(t *testing.T) {
	t.Parallel()
	w := newWitness(t, startRoom(t, "-rate", "5").url)
	fast, calm := newClient(t, w.c.url).login("fast"), newClient(t, w.c.url).login("calm")
	for range 30 {
		got := fast.post(" ")
		require(t, got == 422, "a blank message: got %d, want 422", got)
	}
	var accepted atomic.Int64
	start := time.Now()
	together(201, func(i int) {
		if i == 200 {
			calm.say("one", "two", "three")
		} else if got := fast.do("POST", "/post", "message=x"); got.status == 204 {
			accepted.Add(1)
		} else if got.status != 429 || !got.retryAfter() {
			t.Errorf("one of 200 at once: got %d with Retry-After %q, want 204, or 429 with one", got.status, got.header.Get("Retry-After"))
		}
	})
	most := 11 + int64(5*time.Since(start).Seconds())
	expect(t, accepted.Load() >= 10 && accepted.Load() <= most, "%d messages passed, want 10 to %d", accepted.Load(), most)
	calm.say("four")
	var got []string
	for line := ""; line != "calm: four"; {
		if line = w.message().said(); line != "fast: x" {
			got = append(got, line)
		}
	}
	same(t, got, []string{"calm: one", "calm: two", "calm: three", "calm: four"}, "of the other sender came")
	eventually(t, "the rate to let the sender in again", func() bool { return fast.post("again") == 204 })
}

// Of a flood the log has one line a minute, with who it was; and nothing when it is over.
func TestFloodInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged output
		s := newTestServer(t, &config{rate: 5, password: "geheim"},
			func(format string, args ...any) { fmt.Fprintf(&logged, format+"\n", args...) })
		logins := func(n int, from, password string) {
			for range n {
				s.ask("POST /login", form("user", "小明", "password", password), from)
			}
		}
		want := ""
		after := func(d time.Duration, line string) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			want += line
			require(t, logged.String() == want, "the log has %q, want %q", logged.String(), want)
		}
		logins(guessBurst, "192.0.2.1", "wrong")
		logins(loginBurst, "192.0.2.9", "geheim")
		after(floodPause, "")
		logins(guessBurst+3, "192.0.2.1", "wrong")
		logins(guessBurst+5, "192.0.2.2", "wrong")
		logins(loginBurst+7, "192.0.2.3", "geheim")
		after(floodPause-1, "")
		after(1, "refused in the last minute: 7 logins (most from 192.0.2.3), 8 passwords (most from 192.0.2.2)\n")
		after(3*floodPause, "")
		logins(guessBurst+1, "192.0.2.1", "wrong")
		after(floodPause, "refused in the last minute: 1 passwords (most from 192.0.2.1)\n")
		same(t, fmt.Sprint(s.tally.totals()), "map[204:0] map[logins:7 passwords:9 posts:0]", "in all it counts")
	})
}

// TestLimits: an address is the peer's, or the last that a proxy on this machine names. It may log in so
// often and try so many passwords, and its sessions together post no more than it may.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limited := func(rate float64, password string) *server {
			return newTestServer(t, &config{rate: rate, password: password}, t.Logf)
		}
		closed, open, free := limited(5, "geheim"), limited(5, ""), limited(0, "geheim")
		const wrong, right, message = "user=x&password=wrong", "user=x&password=geheim", "message=x"
		for _, test := range []struct {
			name             string
			s                *server
			path, body, from string
			want             int
			atOnce, inASec   int // of 600, and a second later
		}{
			{"logins", closed, "/login", right, "192.0.2.1", 303, 400, 5},
			{"logins of another address", closed, "/login", right, "192.0.2.2", 303, 400, 5},
			{"logins, the address behind what the client says", closed, "/login", right, "192.0.2.9, 192.0.2.1", 303, 5, 5},
			{"wrong passwords", closed, "/login", wrong, "192.0.2.3", 403, 20, 1},
			{"the right one after that", closed, "/login", right, "192.0.2.3", 303, 0, 400},
			{"wrong passwords of an IPv6 network", closed, "/login", wrong, "2001:db8::1", 403, 20, 1},
			{"another address of that network", closed, "/login", wrong, "2001:db8::ffff:1", 403, 0, 1},
			{"another network", closed, "/login", wrong, "2001:db8:0:1::1", 403, 20, 1},
			{"logins without limits", free, "/login", right, "192.0.2.1", 303, 600, 600},
			{"wrong passwords without limits", free, "/login", wrong, "192.0.2.1", 403, 600, 600},
			{"messages without a session", open, "/post", message, "192.0.2.1", 204, 10, 5},
			{"messages of another address", open, "/post", message, "192.0.2.1, 192.0.2.2", 204, 10, 5},
		} {
			for i, most := range []int{test.atOnce, test.inASec} {
				time.Sleep(time.Duration(i) * time.Second)
				passed := 0
				for range 600 {
					w := test.s.ask("POST "+test.path, test.body, "127.0.0.1", "X-Forwarded-For: "+test.from)
					if w.Code == test.want {
						passed++
					} else if w.Code != 429 || !onlySeconds.MatchString(w.Header().Get("Retry-After")) {
						t.Fatalf("%s: got %d with Retry-After %q, want %d, or 429 with one", test.name, w.Code, w.Header().Get("Retry-After"), test.want)
					}
				}
				expect(t, passed == most, "%s: %d were answered %d, the others 429; want %d", test.name, passed, test.want, most)
			}
		}

		post := func(id, address string) (status int, said string) {
			status, said, _ = open.accept(t.Context(), session{id: id, name: "x"}, address, cryptorand.Text(), "x")
			return status, said
		}
		burst := func(id, address string) (passed int) {
			for ; passed < 600; passed++ {
				if status, _ := post(strings.ReplaceAll(id, "N", strconv.Itoa(passed)), address); status != 204 {
					break
				}
			}
			return passed
		}
		passed := 0
		for i := range 1000 {
			if status, said := post(fmt.Sprint("session ", i%100), "192.0.2.8"); status == 204 {
				passed++
			} else if !strings.Contains(said, "address") {
				t.Errorf("refused because %q", said)
			}
		}
		same(t, passed, 500, "a hundred sessions of one address posted")
		for range 20 {
			post("refused", "192.0.2.8")
		}
		same(t, burst("refused", "192.0.2.9"), 10, "who was refused for its address posts")
		time.Sleep(time.Second)
		same(t, burst("new N", "192.0.2.8"), 50, "a second later that address posted")
	})
}

// What net/http says of a panic is logged; what a client makes it say, as of garbage where TLS
// should be, is not.
func TestLogOfPanics(t *testing.T) {
	t.Parallel()
	var logged output
	s := newTestServer(t, &config{}, func(format string, args ...any) { fmt.Fprintf(&logged, format, args...) })
	s.mux.HandleFunc("GET /panic", func(http.ResponseWriter, *http.Request) { panic("out of order") })
	front := httptest.NewUnstartedServer(nil)
	front.Config = s.httpServer(t.Context())
	front.StartTLS()
	for _, garbage := range []string{rawGet("/healthz"), "\x00\x01\x02\x03 is no TLS\n"} {
		rawRequest(t, front.Listener.Addr().String(), garbage)
	}
	_, err := front.Client().Get(front.URL + "/panic")
	expect(t, err != nil, "a handler that panics gives an answer")
	front.Close()
	got := logged.String()
	expect(t, strings.Count(got, "http: panic serving") == 1 && strings.HasPrefix(got, "http: panic") && strings.Contains(got, "out of order\ngoroutine ") && !strings.Contains(got, "TLS"),
		"of a panic it logged %q, want what and where, and nothing else", got)
}

// ---- redis ----

// TestTwoProcesses has two processes on one Redis, and later a third.
func TestTwoProcesses(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	one := newClient(t, r.room().url).login("小明")
	two := one.at(r.room().url) // the session holds there too
	atOne, atTwo := one.stream("", ""), two.stream("", "")
	together(2, func(i int) {
		for n := range 20 {
			[]*client{one, two}[i].sayAs(fmt.Sprintf("%s-%d-%02d", keyA, i, n), fmt.Sprint(i, n))
		}
	})
	together(20, func(i int) { []*client{one, two}[i%2].sayAs(keyB, "once") })
	for i, c := range []*client{two, one} {
		c.sayAs(fmt.Sprintf("%s-%d-00", keyA, i), "again") // a key of the other process
	}
	three := one.at(r.room().url)
	atThree := three.stream("", "")
	var ids []string
	for range 41 {
		a, b, c := atOne.message(), atTwo.message(), atThree.message()
		require(t, a.id == b.id && a.data == b.data && a.id == c.id && a.data == c.data, "the processes differ: %v, %v, the late one %v", a, b, c)
		ids = append(ids, a.id)
	}
	one.say("last")
	for _, open := range []*answer{atOne, atTwo, atThree} {
		open.hears("小明: last") // so every process has it
	}
	for i, c := range []*client{one, two, three} {
		got := c.poll(ids[30])
		expect(t, got[0].id == ids[31] && len(heard(got)) == 11, "resuming at process %d: got %q, want the 11 messages after %s", i, tell(got), ids[30])
	}
}

// TestRedisLayout is the contract with other programs on the same Redis.
func TestRedisLayout(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	name, long := strings.Repeat("名", 24), strings.Repeat("字\n", 1999)+"字😀"
	c := newClient(t, r.room().url).login(name)
	published := r.listen("chat", "chat:id")
	var list []string
	for key, text := range map[string]string{keyA: "你好", keyB: "one\ntwo", keyA + "-long": long} {
		id := c.sayAs(key, text)
		got := next(t, published)
		expect(t, got == "chat:id "+id, "before the line came %q, want the id %s", got, id)
		line, ok := strings.CutPrefix(next(t, published), "chat ")
		expect(t, ok && clockTime.MatchString(line) && (event{data: line}).said() == name+": "+strings.ReplaceAll(text, "\n", "\u2028"),
			"of %.20q came the line %.99q, want time, name and text, and of a line break U+2028", text, line)
		list = append(list, id+" "+line)
	}
	c.sayAs(keyA, "again")
	c.post("")
	r.do("PUBLISH", "chat", "foreign")
	same(t, next(t, published), "chat foreign", "then came")
	same(t, r.history(), list, "chat:history holds")
	eventually(t, "the foreign line to come", func() bool { return slices.Contains(c.newcomer(), "foreign") })
	want := c.newcomer()
	if got := newClient(t, r.room().url).newcomer(); !slices.Contains(got, long) || !slices.Equal(append(got, "foreign"), want) {
		t.Errorf("a room that starts has %d messages, and the first one %d, want the same but for the foreign line", len(got), len(want))
	}
	expect(t, len(r.get("chat:key")) >= 32, "chat:key holds %q, want a key", r.get("chat:key"))

	class := newClient(t, r.room("-channel", "class").url) // another room
	class.say("here")
	same(t, class.newcomer(), []string{"here"}, "the room of -channel class holds")
	same(t, len(r.history()), len(list), "messages of the other one")
	for _, name := range []string{"class:history", "class:key"} {
		eventually(t, name+" to be kept for 30 days", func() bool {
			seconds, _ := redis.Int(r.do("TTL", name), nil)
			return seconds > int(keptFor.Seconds())-60
		})
	}
}

func TestListIsTrimmed(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	r.fill(4700, "")
	c := newClient(t, r.room("-history", "4096").url)
	c.say("one more")
	got := r.texts()
	expect(t, len(got) == 4608 && got[4606] == "4700", "the list holds %d items, want 4608 and the newest", len(got))
	got = c.newcomer()
	expect(t, len(got) == 4096 && got[0] == "606" && got[4095] == "one more", "a newcomer gets %d messages, want 4096 up to the newest", len(got))
}

// A Redis that forgets while nobody posts gets the history back, so that it does not end with the
// process that holds it, and a gap.
func TestForgottenWhileQuiet(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	newClient(t, r.room().url).say("a", "b", "c")
	before := r.history()
	r.do("FLUSHALL")
	eventually(t, "the list to be back", func() bool { return len(r.history()) > 0 })
	got := r.history()
	expect(t, len(got) == 4 && slices.Equal(got[:3], before) && r.texts()[3] == "(gap)", "the list is %q, want %q and a gap", got, before)
}

// What is written back is the log as TestReconcile has it, without foreign lines and with a gap at its
// end: the newest that make a list. Here that holds four.
func TestWrittenBack(t *testing.T) {
	entries := func(names string) (list []entry) {
		for name := range strings.FieldsSeq(names) {
			base, hash, foreign := strings.Cut(name, ".")
			if id := base + "~aaaaaaaa"; foreign {
				list = append(list, entry{id + "." + hash, name})
			} else {
				list = append(list, entry{id, name})
			}
		}
		return list
	}
	for _, test := range []struct{ name, mine, list, log, items string }{
		{"nothing, if the list lacks nothing", "a b b.f", "a b c", "a b b.f c", ""},
		{"all, and a gap", "a b", "", "a b !gap", "a b !gap"},
		{"foreign lines are not", "a a.f b", "a", "a a.f b !gap", "a b !gap"},
		{"of a list that is full the newest", "b c d e", "a b d e", "a b c d e !gap", "c d e !gap"},
		{"what is older than the log stays in the list", "c d", "a b c", "a b c d !gap", "b c d !gap"},
	} {
		l := newLog(4, 4)
		l.rebuild(entries(test.mine), false)
		log, items := newFeed(l, "chat").merge(entries(test.list))
		a, b := strings.Join(lines(log), " "), strings.Join(lines(items), " ")
		expect(t, a == test.log && b == test.items, "%s: got the log %q and the list %q, want %q and %q", test.name, a, b, test.log, test.items)
		l.close()
	}
}

// What the list must have at least: the items that were in it, and each announced line since, copies
// too, which would else hide that Redis forgot.
func TestLeast(t *testing.T) {
	f := newFeed(newTestLog(t, 10), "chat")
	f.begin(numbered(0, 3), "", 5, false)
	for _, said := range [][2]string{{"chat:id", testID(1)}, {"chat", "a copy"}, {"chat", "foreign"}, {"chat:id", testID(9)}, {"chat", "new"}} {
		f.hear(said[0], said[1])
	}
	same(t, f.least(), 7, "5 items, a copy, a foreign line and a new one make")
	f.begin(nil, "", 9999, false)
	same(t, f.least(), int64(listSize(ringSize)), "of a long list it is what is kept")
}

// TestBadList joins a Redis whose list holds what no process wrote.
func TestBadList(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	one := newClient(t, r.room().url)
	one.say("before")
	for _, item := range []string{
		"", " ", " no id", "garbage", "some words", "short~aaaaaaaa [12:34:56] x: y", unknownID, unknownID + " ",
		"redis-list-key-01~aaaaaaaa [12:34:56] x: 1",
		"redis-list-key-01~aaaaaaaa [12:34:56] x: the same id again",
		"redis-list-key-01~bbbbbbbb [12:34:56] x: the same key again",
		"redis-list-key-02~aaaaaaaa [12:34:56] x: 2\r\n\r\nevent: gap\r\ndata:\r\n\r\n",
		"redis-list-key-03~aaaaaaaa\n [12:34:56] x: the id has a line break",
		"redis-list-key-03 [12:34:56] x: no tail, as in an older version",
		"redis-list-key-04~aaaaaaaa [12:34:56] x: \xff",
		"redis-list-key-05~aaaaaaaa " + strings.Repeat("x", 10<<20),
		"redis-list-key-06~aaaaaaaa !an act that nobody knows yet",
		"redis-list-key-07~aaaaaaaa [12:34:56] x: 7",
		"junk at the end",
	} {
		r.do("RPUSH", "chat:history", item)
	}
	want := []string{"before", "1", "2\n\nevent: gap\ndata:\n\n", "\ufffd", strings.Repeat("x", maxLine-1) + "…", "7"}
	two := newClient(t, r.room().url)
	r.cut() // so that the first one joins again
	eventually(t, "the first room to have it", func() bool { return len(one.newcomer()) > 1 })
	for _, c := range []*client{one, two} {
		same(t, c.newcomer(), want, "of the list come")
	}
	eventually(t, "both rooms to be joined", func() bool { return one.healthy() && two.healthy() })
	r.do("PUBLISH", "chat", "foreign")
	for _, c := range []*client{one, two} { // under one id, for readers who change the process
		got := c.stream("", "redis-list-key-07~aaaaaaaa").until("foreign")
		id := got[len(got)-1].id
		expect(t, strings.HasPrefix(id, "redis-list-key-07~aaaaaaaa.") && foreignID.MatchString(id), "a foreign line behind it has the id %s", id)
	}
	newWitness(t, two.url).heard()
}

// TestForeignLines publishes as the Flask original and redis-cli do: without an id.
func TestForeignLines(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	one := newClient(t, r.room().url)
	two := one.at(r.room().url)
	atOne, atTwo := one.stream("", ""), two.stream("", "")
	foreign := func(line, after string) string {
		t.Helper()
		r.do("PUBLISH", "chat", line)
		a, b := atOne.message(), atTwo.message()
		require(t, a.id == b.id && a.data == b.data && a.data == strings.ReplaceAll(line, "\u2028", "\n"),
			"of %q the processes make %v and %v", line, a, b)
		expect(t, foreignID.MatchString(a.id) && strings.HasPrefix(a.id, after+"."),
			"%q has the id %q, want %s, a dot and eight letters", line, a.id, after)
		return a.id
	}
	early := foreign("[12:34:56] flask: hi", "0")
	announced := one.sayAs(keyA, "announced")
	atOne.hears("anonymous: announced")
	atTwo.hears("anonymous: announced")
	first, second, third := foreign("hi", announced), foreign("hi", announced), foreign("two\u2028lines", announced)
	ids := []string{early, first, second, third}
	expect(t, !doubled(ids), "foreign lines have the ids %q, want four", ids)
	same(t, heard(two.poll(first)), []string{"hi", "two\nlines"}, "after the first foreign line")
	same(t, r.texts(), []string{"announced"}, "chat:history holds")
	three := one.at(r.room().url)
	one.say("next")
	got := three.stream("", third).upTo("next")
	expect(t, len(got) == 1, "a process that does not know the foreign id resumes with %q, want what follows the announced line", got)
}

// Other programs may publish lines without end: what a feed remembers of them is bounded, and
// each line gets in, under an id of its own, also one that was said before it forgot.
func TestForeignLinesWithoutEnd(t *testing.T) {
	l := newTestLog(t, 200)
	f := newFeed(l, "chat")
	f.begin(nil, "", 0, false)
	for i := range uint64(2 * ringSize) {
		line := fmt.Sprint("line ", i)
		if i > ringSize-100 && i%10 == 0 { // so that the log still has those from before
			line = "the same again"
		}
		f.hear("chat", line)
		r := l.ring
		require(t, r.next == i+1 && r.at(i).line == line && validID(r.at(i).id), "line %d is not the %d. of the log, with an id", i, i+1)
	}
}

// TestBadRedis publishes on the room's channels what the room itself never would.
func TestBadRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	w := newWitness(t, r.room().url)
	for line, want := range map[string]string{ // line breaks do not count
		"hi": "hi", "a\xffb": "a\ufffdb", "a\xed\xa0\x80b": "a\ufffd\ufffd\ufffdb", "a\x00b": "ab", "a\x01\x1b\x7f\u009bb": "ab",
		"a\u202eb\u2066c\u200fd": "abcd", "a\rb\nc\r\nd": "abcd", "<script>alert(1)</script>": "<script>alert(1)</script>",
		"a\nid: 0\nevent: gap\nretry: 1": "aid: 0event: gapretry: 1", "a\r\revent: gap\rdata:\r\r": "aevent: gapdata:",
		"a\u2028\u2028event: ping\u2028data:": "aevent: pingdata:", "a\u2029\u2029event: ping\u2029data:": "aevent: pingdata:",
		"a\v\vid: 0\f\fdata:\u0085\u0085": "aid: 0data:", "a\x1c\x1did: 0\x1e\x1edata:": "aid: 0data:", "event: gap\ndata:\n\ndata: a": "event: gapdata:data: a",
		unknownID: unknownID, unknownID + " [12:34:56] x: y": unknownID + " [12:34:56] x: y", "!gap": "!gap",
		strings.Repeat("字", 4100): strings.Repeat("字", 4100),
		"":                        "", " \t\u3000": "", "\r\n\u2028": "", "\x00\u202e": "", // of these nothing is shown
	} {
		r.do("PUBLISH", "chat", line)
		if want == "" {
			continue // the next one would see it
		}
		e := w.message()
		require(t, strings.ReplaceAll(e.data, "\n", "") == want && foreignID.MatchString(e.id),
			"of %.60q came %.200q under the id %s, want %.60q", line, e.data, e.id, want)
	}
	for name, line := range map[string]string{ // not through Redis: where this is slow, a word of the room would be late
		"4101 characters":         strings.Repeat("字", 4101),
		"10 MB":                   strings.Repeat("x", 10<<20),
		"1 MB of combining marks": "a" + strings.Repeat("\u0301", 1<<19),
		"1 MB that is not UTF-8":  strings.Repeat("\xff", 1<<20),
		"1 MB of CR":              "x" + strings.Repeat("\r", 1<<20) + "y",
		"1 MB of U+2028":          "x" + strings.Repeat("\u2028", 1<<19) + "y",
		"1 MB of what is dropped": strings.Repeat("\x00", 1<<20) + strings.Repeat("y", 5000),
	} {
		if got := fromRedis(line); utf8.RuneCountInString(got) != maxLine || !strings.HasSuffix(got, "…") {
			t.Errorf("of %s came %d characters and %+.40q at the end, want %d and …", name, utf8.RuneCountInString(got), got[max(0, len(got)-9):], maxLine)
		}
	}
	id := func(n int) string { return fmt.Sprintf("redis-test-key-%02d~aaaaaaaa", n) }
	for _, test := range []struct {
		name string
		ids  []string // published on chat:id first
		line string
		want string // the id; "" for that of a foreign line, "-" if nothing is to be shown
	}{
		{"an id and its line", []string{id(1)}, "a", id(1)},
		{"a known id", []string{id(1)}, "another", "-"},
		{"a known key with another tail", []string{nameOf(id(1)) + "~bbbbbbbb"}, "another", "-"},
		{"two ids, the last counts", []string{id(2), id(3)}, "a", id(3)},
		{"the first of them is free", []string{id(2)}, "a", id(2)},
		{"a key without a tail, as of an older version", []string{nameOf(id(4))}, "a", ""},
		{"a key that is too short", []string{"short~aaaaaaaa"}, "a", ""},
		{"a tail that is too short", []string{id(4)[:23]}, "a", ""},
		{"a tail in capitals", []string{strings.ToUpper(id(4))}, "a", ""},
		{"an id with a line break", []string{id(4) + "\nevent: gap"}, "a", ""},
		{"an id with a line break at its end", []string{id(4) + "\n"}, "a", ""},
		{"an id with NUL", []string{id(4) + "\x00"}, "a", ""},
		{"an id of 1 MB", []string{strings.Repeat("x", 1<<20)}, "a", ""},
		{"an empty id", []string{""}, "a", ""},
		{"the id of a foreign line", []string{id(4) + ".abcdefgh"}, "a", ""},
		{"the beginning as an id", []string{"0"}, "a", ""},
		{"a bad id behind a good one is ignored", []string{id(5), "bad!"}, "a", id(5)},
		{"an announced act is ignored", []string{id(4)}, "!gap", "-"},
	} {
		for _, id := range test.ids {
			r.do("PUBLISH", "chat:id", id)
		}
		r.do("RPUSH", "chat:history", test.ids[0]+" "+test.line) // or the room would think that Redis forgot it
		if r.do("PUBLISH", "chat", test.line); test.want == "-" {
			continue // the next row would see it
		}
		if e := w.message(); e.data != test.line || test.want == "" && !foreignID.MatchString(e.id) || test.want != "" && e.id != test.want {
			t.Errorf("%s: got %q under the id %q, want %q", test.name, e.data, e.id, cmp.Or(test.want, "that of a foreign line"))
		}
	}
	for _, channel := range []string{"chat:probe", "chat:history", "chat:key", "chat:id"} {
		r.do("PUBLISH", channel, "noise")
	}
	r.do("PUBLISH", "chat:id", "announced-and-no-line~aaaaaaaa")
	w.heard()
}

// TestUnknownID comes to a room on Redis with an id that it does not know.
func TestUnknownID(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	line := newRelay(t, r.addr)
	c := newClient(t, startRoom(t, "-redis", line.addr).joined().url)
	elsewhere := c.at(r.room().url)
	c.say("one")
	for _, garbage := range []string{"§", "short", strings.Repeat("x", 65), keyA} {
		same(t, tell(c.stream("", garbage).until("ping")), []string{"(gap)", "one", "(ping)"}, "what cannot be an id")
	}
	for _, query := range []string{"", "wait=0", "wait=25s"} {
		eventually(t, "a round trip that is quicker than a poll", func() bool {
			got := tell(c.stream(query, unknownID).until("ping"))
			expect(t, len(got) != 4 || slices.Equal(got, []string{"(wait)", "(gap)", "one", "(ping)"}),
				"what is nowhere, with %q: got %q, want wait, gap, the message and a ping", query, got)
			return len(got) == 4
		})
	}

	line.hold() // nothing comes from Redis, and so nobody can know
	onItsWay := elsewhere.sayAs(keyA, "two")
	unsettled := c.poll(onItsWay)
	same(t, tell(unsettled), []string{"(wait)", "(ping)", "(end)"}, "a poll that cannot be settled")
	for _, e := range unsettled {
		expect(t, e.id == "" || e.id == onItsWay, "a poll that is not settled moves the reader to %q", e.id)
	}
	lost, early := c.stream("", unknownID), c.stream("", onItsWay)
	for _, s := range []*answer{lost, early} {
		got := s.next(patience)
		expect(t, got.kind == "wait" && got.data == "" && len(got.retry) == 1, "at once: got %v, want retry and wait", got)
	}
	line.release()
	elsewhere.say("three")
	same(t, early.upTo("three"), []string{"three"}, "behind an id that was on its way came")
	same(t, lost.upTo("three"), []string{"(gap)", "one", "two", "three"}, "behind an id that did not arrive came")
}

// One key that 400 people post at once takes one place in the list.
func TestOneKeyAtOnce(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	c := newClient(t, r.room().url)
	ids := make([]string, 400)
	together(len(ids), func(i int) { ids[i] = newClient(t, c.url).login(fmt.Sprint(i)).sayAs(keyA, "once") })
	if list := r.texts(); len(list) != 1 || len(slices.Compact(ids)) != 1 {
		t.Errorf("one key posted by 400 has the ids %q, and %d items in the list; want one", slices.Compact(ids), len(list))
	}
}

// A second post of a key that is under way waits for the first one. If that is not confirmed it tries
// in the time that it has left.
func TestSecondPostOfAKey(t *testing.T) {
	for _, confirmed := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			r := inMemory(newTestLog(t, 200))
			defer r.log.close()
			r.broker = newBroker(&config{redis: &url.URL{}}, r.log, t.Logf, nil)
			r.broker.setJoined()
			ids, start := make(chan string, 2), time.Now()
			for i := range 2 {
				go func() {
					time.Sleep(time.Duration(i) * time.Second)
					id, err := r.say(t.Context(), keyA, "[12:00:00] x: y")
					ids <- fmt.Sprint(id, " ", err, " after ", time.Since(start))
				}()
			}
			first := <-r.broker.outgoing
			if time.Sleep(confirmTimeout - time.Millisecond); confirmed {
				first.done <- nil
				r.log.append(first.entry)
				for range 2 {
					same(t, <-ids, first.id+" <nil> after 1.999s", "confirmed")
				}
				return
			}
			same(t, <-ids, " context deadline exceeded after 2s", "the first")
			second := <-r.broker.outgoing
			time.Sleep(time.Second / 2)
			second.done <- nil
			r.log.append(second.entry)
			got, want := <-ids, second.id+" <nil> after 2.5s"
			expect(t, got == want && keyOf(second.id) == keyA && second.id != first.id, "the second: got %q, want %q", got, want)
		})
	}
}

// Of the posts that wait, batchSize share a round trip, in the order in which they came.
func TestBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &broker{outgoing: make(chan *attempt)}
		all := numbered(0, 2*batchSize+batchSize/2)
		for _, m := range all {
			go func() { b.outgoing <- &attempt{entry: m} }()
			synctest.Wait() // it stands in the queue
		}
		var got []entry
		for _, size := range []int{batchSize, batchSize, batchSize / 2} {
			batch := b.batch(<-b.outgoing)
			same(t, len(batch), size, "a batch has")
			for _, p := range batch {
				got = append(got, p.entry)
			}
		}
		same(t, got, all, "the batches are")
	})
}

// Each write to Redis has its own time, and one that is not taken ends after it.
func TestWriteToRedisInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		c := timelyConn{near, redisTimeout}
		go far.Read(make([]byte, 1))
		time.Sleep(2 * redisTimeout) // since the connection was made, which is nothing to the write
		_, err := c.Write([]byte("x"))
		same(t, err, nil, "writing what is taken")
		time.Sleep(redisTimeout / 2) // nor is the time since the last one
		start := time.Now()
		_, err = c.Write([]byte("x"))
		took := time.Since(start)
		expect(t, errors.Is(err, os.ErrDeadlineExceeded) && took == redisTimeout,
			"writing what nobody takes: %v after %v, want the deadline after %v", err, took, redisTimeout)
	})
}

// A Redis that takes no more than fits on the way ends a connection of the broker in time.
func TestRedisThatStopsReading(t *testing.T) {
	t.Parallel()
	deaf, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer deaf.Close()
	c, err := (&broker{url: "redis://" + deaf.Addr().String()}).dial(t.Context(), redisTimeout)
	must(t, err)
	start := time.Now()
	_, err = c.Do("SET", "key", strings.Repeat("x", 64<<20))
	took := time.Since(start)
	expect(t, errors.Is(err, os.ErrDeadlineExceeded) && took <= patience,
		"writing to a Redis that does not read: %v after %v, want the deadline", err, took)
}

// Why a transaction was refused is told, not that EXEC discarded it; an EXEC without replies is
// no success.
func TestRefusedTransaction(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	r.do("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1")
	c, err := redis.Dial("tcp", r.addr)
	must(t, err)
	defer c.Close()
	c.Send("MULTI")
	c.Send("RPUSH", "chat:history", "x")
	for range 3 {
		c.Send("PUBLISH", "chat", "x")
	}
	_, err = commit(c)
	expect(t, err != nil && strings.HasPrefix(err.Error(), "OOM"), "a transaction without memory: %v, want OOM", err)
	_, err = results([]any{"OK", "QUEUED", []any{}})
	expect(t, err != nil, "an EXEC without replies is taken for a success")
}

// Each post of a batch has its own outcome, and an EXEC that a look-alike of Redis answers with less than
// it should is no success.
func TestOutcomesOfABatch(t *testing.T) {
	t.Parallel()
	const queued, good = "+OK\r\n+QUEUED\r\n+QUEUED\r\n+QUEUED\r\n+QUEUED\r\n", "*4\r\n:2\r\n:2\r\n:1\r\n:1\r\n"
	for name, test := range map[string]struct {
		second  string // the answer to the second EXEC of three
		refused bool
		told    string // first words of what the posts are told, and of what send returns
	}{
		"all go well":                     {good, false, "nil nil nil nil"},
		"an error inside of EXEC":         {"*4\r\n-OOM no\r\n:2\r\n:1\r\n:1\r\n", false, "nil OOM OOM OOM"},
		"a command is refused":            {"-EXECABORT no\r\n", true, "nil ERR ERR ERR"},
		"EXEC did nothing":                {"*-1\r\n", false, "nil redigo: redigo: redigo:"},
		"EXEC without replies":            {"*0\r\n", false, "nil a a a"},
		"EXEC with half of its replies":   {"*2\r\n:2\r\n:2\r\n", false, "nil a a a"},
		"the list is shorter than it was": {"*4\r\n:1\r\n:2\r\n:1\r\n:1\r\n", false, "nil nil nil the"},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := net.Pipe()
			defer far.Close()
			go io.Copy(io.Discard, far)
			second := queued
			if test.refused {
				second = strings.Replace(queued, "+QUEUED", "-ERR no", 1)
			}
			go io.WriteString(far, queued+good+second+test.second+queued+good)
			f := newFeed(newTestLog(t, 200), "chat")
			f.length.Store(1)
			var batch []*attempt
			for _, m := range numbered(0, 3) {
				batch = append(batch, &attempt{m, make(chan error, 1)})
			}
			outcomes := []error{(&broker{channel: "chat"}).send(redis.NewConn(near, patience, patience), f, batch)}
			for i := range batch {
				outcomes = slices.Insert(outcomes, i, <-batch[i].done)
			}
			var told []string
			for _, err := range outcomes {
				words := "nil"
				if err != nil {
					words, _, _ = strings.Cut(err.Error(), " ")
				}
				told = append(told, words)
			}
			same(t, strings.Join(told, " "), test.told, "the posts were told, and send returned")
		})
	}
}

// A spoiler has the first WATCH come to nothing, and notes what is published.
type spoiler struct {
	redis.Conn
	spoil     func() // once
	published []any
}

func (c *spoiler) Do(command string, args ...any) (any, error) {
	answer, err := c.Conn.Do(command, args...)
	if command == "WATCH" && c.spoil != nil {
		c.spoil()
		c.spoil = nil
	}
	return answer, err
}

func (c *spoiler) Send(command string, args ...any) error {
	if command == "PUBLISH" {
		c.published = append(c.published, args[1])
	}
	return c.Conn.Send(command, args...)
}

// A probe is the seam of one try to write the list back: the next one has another.
func TestProbeServesOnce(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	c, err := redis.Dial("tcp", r.addr)
	must(t, err)
	defer c.Close()
	spoiled := &spoiler{Conn: c, spoil: func() { r.do("RPUSH", "chat:history", testID(9)+" meanwhile") }}
	b := newBroker(&config{redis: &url.URL{Host: r.addr}, channel: "chat"}, newTestLog(t, 200, numbered(0, 3)), t.Logf, func(string) {})
	f, err := b.takeList(spoiled)
	must(t, err)
	said := spoiled.published
	require(t, len(said) == 4, "it published %q, want a probe and rewritten, twice", said)
	same(t, said[3], any(f.seam), "the seam is")
	expect(t, said[0] != said[2] && said[1] == any(rewritten+said[0].(string)) && said[3] == any(rewritten+said[2].(string)),
		"it published %q, want another probe for the second try", said)
}

// Who follows the subscription has ended when a stay has: the next one must be alone to append.
func TestOneFollows(t *testing.T) { // alone: it looks at all goroutines
	r := startRedis(t)
	l := newTestLog(t, 200)
	b := newBroker(&config{redis: &url.URL{Scheme: "redis", Host: r.addr}, channel: "chat"}, l, t.Logf, func(string) {})
	stayed := make(chan error, 1)
	ctx, leave := context.WithCancel(t.Context())
	go func() { stayed <- b.stay(ctx) }()
	eventually(t, "the room to be joined", func() bool { return b.away() == nil })
	stands := func(in, at string) func() bool {
		return func() bool {
			stacks := make([]byte, 4<<20)
			stacks = stacks[:runtime.Stack(stacks, true)]
			return slices.ContainsFunc(bytes.Split(stacks, []byte("\n\n")), func(stack []byte) bool {
				return bytes.Contains(stack, []byte(in)) && bytes.Contains(stack, []byte(at))
			})
		}
	}
	l.mu.Lock()
	unlock := sync.OnceFunc(l.mu.Unlock)
	defer unlock()
	r.do("PUBLISH", "chat", "a line that cannot be appended yet")
	eventually(t, "the line to come", stands(".follow(", "sync.(*Mutex).Lock"))
	leave()
	b.outgoing <- &attempt{numbered(0, 1)[0], make(chan error, 1)} // which tells tend
	eventually(t, "the stay to wait", stands("(*broker).stay(", "sync.(*WaitGroup).Wait"))
	unlock()
	expect(t, <-stayed != nil, "a stay that was left ended without an error")
}

// Of two cookie keys, one of which was drawn while Redis had forgotten the other, the older one
// ends up everywhere. The key alone may be forgotten too, such as by a Redis that has to make room.
func TestKeyOfTheRoom(t *testing.T) {
	t.Parallel()
	expect(t, keyGrace >= syncEvery+redisTimeout, "keyGrace is %v, less than it takes to notice that a key was forgotten", keyGrace)
	const older = "0000000000000001-drawn-before"
	for _, test := range []struct{ name, set, want string }{ // "" is the room's own
		{"forgotten", "", ""},
		{"a newer one", "ffffffffffffffff-drawn-later", ""},
		{"an older one", older, older},
	} {
		for _, cut := range []bool{true, false} {
			t.Run(fmt.Sprint(test.name, ", connections cut: ", cut), func(t *testing.T) {
				t.Parallel()
				r := startRedis(t)
				c := newClient(t, r.room().url).login("early")
				want := cmp.Or(test.want, r.get("chat:key"))
				if r.do("SET", "chat:key", test.set); test.set == "" {
					r.do("DEL", "chat:key")
				}
				if cut {
					r.cut()
				}
				eventually(t, "the key to be agreed upon", func() bool {
					late := newClient(t, c.url)
					if late.do("POST", "/login", "user=late").status != 303 {
						return false
					}
					_, ok := newSigner(want, "").verify(late.session().Value, time.Now())
					return ok && r.get("chat:key") == want && late.healthy()
				})
				got := c.get("/").status
				expect(t, (got == 200) == (test.want == ""), "the page in a session of before: got %d", got)
			})
		}
	}
}

// With a key of its own a room neither looks for one in Redis nor minds what is there. It sends its
// word on a round trip every 5 s.
func TestOwnKeyStaysOutOfRedis(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	t.Parallel()
	for _, found := range []string{"", "another"} {
		r := startRedis(t)
		if found != "" {
			r.do("SET", "chat:key", found)
		}
		probes := r.listen("chat:probe")
		room := r.room("CHAT_KEY=geheim")
		joined := next(t, probes)
		start := time.Now()
		again := next(t, probes)
		expect(t, again == joined && time.Since(start) >= syncEvery/2 && time.Since(start) <= 3*syncEvery,
			"the word is %q, and after %v %q, want the same after %v", joined, time.Since(start), again, syncEvery)
		same(t, r.get("chat:key"), found, "chat:key is")
		room.changed("joined")
	}
}

// TestKeyWhileJoining has the key put back by a process that knows it, while another that has drawn
// one is held up: before it subscribes, so that it does not hear of that, and before it has the
// list, when it does not listen to that.
func TestKeyWhileJoining(t *testing.T) {
	t.Parallel()
	for name, word := range map[string]string{"before it subscribes": "SUBSCRIBE", "before it has the list": wantsList} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			own, line := newRelay(t, r.addr), newRelay(t, r.addr)
			one := newClient(t, startRoom(t, "-redis", own.addr).joined().url)
			r.do("DEL", "chat:key")
			held := line.holdBefore(word)
			two := one.at(startRoom(t, "-redis", line.addr).url)
			eventually(t, "the joining to be held", held)
			own.cut()
			own.mend()
			eventually(t, "the first to be back", one.healthy)
			one.login("early")
			line.release()
			eventually(t, "the sessions of one to hold at the other", func() bool { return two.get("/").status == http.StatusOK })
		})
	}
}

// TestKeyDrawnTwice starts a process on a Redis that forgot the key of the cookies, while the
// one that knows it is cut off. Sessions of before must hold everywhere once it is back.
func TestKeyDrawnTwice(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	line := newRelay(t, r.addr)
	one := newClient(t, startRoom(t, "-redis", line.addr).joined().url).login("early")
	line.cut()
	r.kill()
	r.start()
	two := r.room()
	newClient(t, two.url).login("late")
	line.mend()
	one.insist("back")
	one.at(two.url).insist("over")
	newClient(t, two.url).login("later").at(one.url).insist("over-again")
}

// While a cookie key is young an older one may yet come back: then no session is refused for good.
func TestYoungKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		for name, test := range map[string]struct {
			key  string
			want bool
		}{
			"drawn now": {drawKey(now), true}, "drawn a nanosecond less than keyGrace ago": {drawKey(now.Add(1 - keyGrace)), true},
			"drawn keyGrace ago": {drawKey(now.Add(-keyGrace)), false}, "drawn where the clock is ahead": {drawKey(now.Add(1)), false},
			"chosen": {"one key", false}, "chosen, of digits": {"0123456789abcde-f", false}, "of a time that cannot be": {"ffffffffffffffff-x", false},
		} {
			same(t, newSigner(test.key, "").young(now), test.want, "a key %s: young is", name)
		}
		rooms := map[string]*server{}
		for name, password := range map[string]string{"open": "", "closed": "geheim"} {
			rooms[name] = newTestServer(t, &config{password: password}, t.Logf)
			rooms[name].signer.Store(newSigner(drawKey(now), password))
		}
		for _, age := range []time.Duration{0, keyGrace} {
			time.Sleep(age)
			young := age == 0
			page := map[bool]int{true: 503, false: 303}[young]
			session := map[bool]int{true: 503, false: 401}[young]
			for _, test := range []struct {
				name, room, request string
				cookie              bool // one that does not verify
				want                int
			}{
				{"posting", "open", "POST /post", true, session},
				{"posting without a cookie", "open", "POST /post", false, 204},
				{"the page", "open", "GET /", true, page},
				{"reading an open room", "open", "HEAD /stream", true, 200},
				{"reading a closed room", "closed", "HEAD /stream", true, session},
				{"reading a closed room without a cookie", "closed", "HEAD /stream", false, 401},
				{"the lesson of a closed room", "closed", "GET /lesson", true, page},
				{"the login form", "closed", "GET /login", true, 200},
			} {
				w := rooms[test.room].ask(test.request, "message=x", "192.0.2.1",
					map[bool]string{true: "Cookie: " + cookieName + "=v1.9999999999.id.eA.stale"}[test.cookie])
				again := w.Header().Get("Retry-After")
				expect(t, w.Code == test.want && (again != "") == (test.want == 503),
					"%s, under a key drawn %v ago: got %d, Retry-After %q, want %d", test.name, age, w.Code, again, test.want)
			}
		}
	})
}

func TestRedisAddress(t *testing.T) {
	t.Parallel()
	r, other := startRedis(t, "--requirepass", "geheim"), startRedis(t)
	url := "redis://:geheim@" + r.addr
	byFlag := startRoom(t, "-redis", url, "REDIS_URL=redis://"+other.addr).joined()
	byEnv := startRoom(t, "REDIS_URL="+url).joined()
	s := newClient(t, byEnv.url).stream("", "")
	newClient(t, byFlag.url).say("hello")
	s.hears("anonymous: hello")
	for _, room := range []*program{byFlag, byEnv} {
		printed := room.out.String() + room.log.String()
		expect(t, !strings.Contains(printed, "geheim"), "the password is printed: %s", printed)
	}
	repeats := startRedis(t, "--rename-command", "AUTH", "") // does not know it, and shows its arguments
	room := startRoom(t, "-redis", "redis://somebody:hunter2@"+repeats.addr)
	eventually(t, "the room to know why", func() bool { return strings.Contains(room.log.String(), "AUTH") })
	shown := newClient(t, room.url).get("/healthz").body + room.log.String()
	expect(t, !strings.Contains(shown, "hunter2"), "the password is shown: %s", shown)
}

// A server that answers with a length that cannot be, which makes redigo panic, is a Redis that is
// away, and repeats nothing unquoted in the log.
func TestImpossibleAnswer(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.Read(make([]byte, 100))
				io.WriteString(c, "$99999999999999999999\r\n")
			}()
		}
	}()
	p := startRoom(t, "-redis", l.Addr().String())
	eventually(t, "it to say so", func() bool { return strings.Contains(p.log.String(), "redis is away") })
	same(t, newClient(t, p.url).get("/login").status, 200, "the room answers")

	r := startRedis(t)
	line := newRelay(t, r.addr)
	p = startRoom(t, "-redis", line.addr).joined()
	text := strings.Repeat("x", 40)
	line.forge("$40\r\n"+text, "$99999999999999999999\r\n")
	r.do("PUBLISH", "chat", text)
	eventually(t, "it to be joined again", func() bool { return slices.Equal(p.changes(), []string{"joined", "away", "joined"}) })
	expect(t, strings.Contains(p.log.String(), "reading what Redis answers"), "it says %s", p.log.String())
}

// TestInWords: what the log says of why Redis is away. No answer of a server stands there unquoted.
func TestInWords(t *testing.T) {
	read := func(err error) error {
		return &net.OpError{Op: "read", Net: "tcp", Addr: &net.TCPAddr{Port: 6379}, Source: &net.TCPAddr{Port: 4711}, Err: err}
	}
	for _, test := range []struct {
		err  error
		want string
	}{
		{redis.Error("NOAUTH Authentication required."), `"NOAUTH Authentication required."`},
		{redis.Error("ERR x\x1b[2J\nfake line, with args beginning with: 'hunter2'"), `"ERR x\x1b[2J\nfake line"`},
		{redis.Error("ERR unknown command 'SET', with args beginning with: 'chat:key' 'secret'"),
			`this is a Sentinel, or a Redis without a command that a room needs; name the master, or a proxy that follows it: "ERR unknown command 'SET'"`},
		{redis.Error("MOVED 1234 10.0.0.1:6379"),
			`this Redis is a cluster: name the node that has the room, whose keys -channel '{chat}' keeps together: "MOVED 1234 10.0.0.1:6379"`},
		{redis.Error(strings.Repeat("x", 1000)), `"` + strings.Repeat("x", 200) + `"`},
		{tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, "this port speaks no TLS: it wants redis://"},
		{errors.New("redigo: unexpected response line (possible server error or unsupported concurrent read by application)"),
			"that is not Redis, or it wants rediss://"},
		{io.EOF, "it has ended the connection"},
		{read(syscall.ECONNRESET), "it has ended the connection"},
		{read(os.ErrDeadlineExceeded), "it does not answer"},
		{&net.OpError{Op: "remote error", Err: errors.New("tls: certificate required")}, "remote error: tls: certificate required"},
		{&net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Name: "redis.test", Err: "read udp 127.0.0.1:4711->127.0.0.1:53: i/o timeout"}},
			`no name server answers for "redis.test"`},
		{&net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}, "dial tcp: connection refused"},
	} {
		same(t, inWords(test.err), test.want, "%v", test.err)
	}
}

func TestWhyAway(t *testing.T) {
	_, refused := net.Dial("tcp", "localhost:"+freePort(t))
	for _, test := range []struct {
		err  error
		want string
	}{
		{refused, "it cannot be reached"},
		{&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "redis.internal"}}, "it cannot be reached"},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, "it does not answer"},
		{fmt.Errorf("joining: %w", redis.Error("WRONGPASS for hunter2")), "it refuses"},
		{io.EOF, "the room has not joined it"},
	} {
		same(t, whyAway(test.err), test.want, "%v", test.err)
	}
}

// TestRedisAbsent starts without Redis, which appears later.
func TestRedisAbsent(t *testing.T) {
	t.Parallel()
	r := newRedis(t)
	withKey := newClient(t, startRoom(t, "-redis", r.addr, "CHAT_KEY=one key").url)
	c := newClient(t, startRoom(t, "-redis", r.addr, "-rate", "5").url)
	withKey.login("小明") // needs no Redis
	cookie := "Cookie: " + withKey.session().String()
	for _, test := range []struct {
		name string
		c    *client
		do   string
		body string
		with []string
		want int
	}{
		{"health", c, "GET /healthz", "", nil, 503},
		{"the login form needs no key", c, "GET /login", "", nil, 200},
		{"logging in needs the key", c, "POST /login", "user=x", nil, 503},
		{"the page without a cookie needs no key", c, "GET /", "", nil, 303},
		{"the page with a cookie needs the key", c, "GET /", "", []string{cookie}, 503},
		{"posting with a cookie needs the key", c, "POST /post", "message=x", []string{cookie}, 503},
		{"posting", c, "POST /post", "message=x", nil, 503},
		{"posting with the key", withKey, "POST /post", "message=x", nil, 503},
		{"a blank message is still refused", c, "POST /post", "message=", nil, 422},
		{"the page with the key", withKey, "GET /", "", nil, 200},
	} {
		method, path, _ := strings.Cut(test.do, " ")
		got := test.c.do(method, path, test.body, test.with...)
		expect(t, got.status == test.want && got.retryAfter() == (test.want == 503),
			"%s: got %d with Retry-After %q, want %d", test.name, got.status, got.header.Get("Retry-After"), test.want)
	}
	c.refusedAtOnce("x")
	for range 30 {
		got := c.post("x")
		require(t, got == 503, "posting on: got %d, want 503, which costs nothing of the rate", got)
	}
	waiting := c.stream("", "")
	polled := tell(c.poll(unknownID))
	expect(t, !slices.Contains(polled, "(gap)"), "a poll without Redis: got %q, want no gap", polled)
	r.start()
	eventually(t, "the room to heal", c.healthy)
	c.say("hello")
	withKey.insist("hello-again")
	same(t, waiting.upTo("hello-again"), []string{"hello", "hello-again"}, "a newcomer that came before Redis")
}

func TestUsage(t *testing.T) {
	t.Parallel()
	ended, end := context.WithCancel(context.Background())
	end() // should a row not be refused, the room closes at once
	const away = "redis://u:geheim@"
	for _, args := range [][]string{
		{"-nothing"}, {"word"}, {"-addr"}, {"-addr", "nonsense"}, {"-addr", "127.0.0.1:99999"},
		{"-history", "-1"}, {"-history", "4097"}, {"-history", "many"},
		{"-rate", "-1"}, {"-rate", "fast"}, {"-rate", "NaN"}, {"-origin", "nonsense"}, {"-channel", ""},
		{"-redis", "http://u:geheim@localhost:6379"}, {"-redis", away + "local host"}, {"-redis", away + "localhost:port"},
		{"-redis", "u:geheim@localhost"}, {"-redis", "redis://:gehe%im@localhost"}, {"-redis", "redis://:geheim@localhost/db"},
		{away + "localhost"}, {"-origin", "http://u:geheim@[localhost"}, {"-history", away + "localhost"},
		{"-origin", ""}, {"-origin", "https://chat.example", "-origin", "https://*.example"},
		{"-redsi=" + away + "localhost"}, {"REDIS_URL=" + away + "localhost:port"},
		{"CHAT_PASSWORD=geheim\ngeheim"}, {"CHAT_PASSWORD=geheim\xff"}, {"CHAT_PASSWORD=\r\n"}, {"CHAT_PASSWORD=\tgeheim"},
		{"TZ=CST-8"}, {"TZ=:Shanghai"}, {"CHAT_KEY=geheim\ngeheim"}, {"CHAT_KEY=geheim\xff"}, {"CHAT_KEY=\n"},
	} {
		env, flags := splitArgs(args)
		var printed bytes.Buffer
		err := run(ended, flags, environ(env...), &printed, &printed)
		if _, usage := errors.AsType[usageError](err); !usage {
			t.Errorf("%q: got %v, want a usage error", args, err)
		} else if text := err.Error(); text == "" || strings.Contains(text, "\n") || strings.Contains(text, "geheim") || printed.Len() > 0 {
			t.Errorf("%q: the error is %q, and %q is printed, want one line without the password, and nothing", args, text, printed.String())
		}
	}
}

func TestEnvironment(t *testing.T) {
	for _, zone := range []string{"", "UTC", "Asia/Shanghai", ":Asia/Shanghai", "/etc/localtime", ":/etc/localtime"} {
		_, err := configure(nil, environ("TZ="+zone), io.Discard)
		expect(t, err == nil, "TZ=%s: %v", zone, err)
	}
	cfg, err := configure(nil, environ("CHAT_KEY=key\n", "CHAT_PASSWORD=blue whale \r\n\n", "REDIS_URL=localhost:6379\r\n"), io.Discard)
	must(t, err)
	expect(t, cfg.key == "key" && cfg.password == "blue whale " && cfg.redis.Host == "localhost:6379",
		"got the key %q, the password %q and Redis at %q", cfg.key, cfg.password, cfg.redis.Host)
}

func TestExitStatus(t *testing.T) {
	t.Parallel()
	file := buildBinary(t)
	info, err := buildinfo.ReadFile(file)
	must(t, err)
	version := "chat " + info.Main.Version // as Go has put it into the binary
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			version += ", commit " + setting.Value
		}
	}
	for _, test := range []struct {
		flag           string
		status         int
		stdout, stderr string
	}{
		{"-h", 0, `(?s)-addr.*-channel.*-history.*-origin.*-rate.*-redis.*-version`, `^$`},
		{"-version", 0, `^` + regexp.QuoteMeta(version+", "+info.GoVersion) + `\n$`, `^$`},
		{"-history=no", 2, `^$`, `^\S[^\n]*\n$`},
		{"-addr=192.0.2.1:1", 1, `^$`, `^\S[^\n]*\n$`},
	} {
		cmd := exec.Command(file, test.flag)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.Run()
		got := cmd.ProcessState.ExitCode()
		expect(t, got == test.status && regexp.MustCompile(test.stdout).MatchString(stdout.String()) && regexp.MustCompile(test.stderr).MatchString(stderr.String()),
			"chat %s: exit status %d, prints %q and %q, want %d, %s and %s", test.flag, got, stdout.String(), stderr.String(), test.status, test.stdout, test.stderr)
	}
}

// TestFirstContact pins the words by which somebody in a hurry finds out what to do.
func TestFirstContact(t *testing.T) {
	t.Parallel()
	fails := func(args ...string) string {
		return fmt.Sprint(run(t.Context(), args, environ(), io.Discard, io.Discard))
	}
	taken := strings.TrimPrefix(startRoom(t).url, "http://")
	for _, c := range []struct{ name, got, want string }{
		{"port taken", fails("-addr", taken),
			"listening on " + taken + ": …; choose another address, such as -addr :8990"},
		{"the port that is proposed has no network", fails("-addr", "192.0.2.1:8990"),
			"listening on 192.0.2.1:8990: …; choose another address, such as -addr :8991"},
		{"stray argument", fails("8990"),
			`unexpected argument "8990"; an address goes behind -addr, as in -addr :8990 (chat -h lists the flags)`},
		{"mistyped flag", fails("-port", "80"), "flag provided but not defined: -port (chat -h lists the flags)"},
	} {
		before, after, _ := strings.Cut(c.want, "…") // the system's words
		expect(t, strings.HasPrefix(c.got, before) && strings.HasSuffix(c.got, after), "%s: got %q, want %q", c.name, c.got, c.want)
	}
	transcript := regexp.MustCompile("(?s)```\n\\$ ./chat\n(.*?)```").FindStringSubmatch(readFile(t, "README.md"))
	require(t, transcript != nil, "README.md does not begin with a transcript")
	first := regexp.QuoteMeta(transcript[1])
	first = strings.Replace(first, `http://192\.168\.1\.20:8989`, `\S+( or \S+)*`, 1) // here other networks
	first = strings.Replace(first, "8989", `\d+`, 1)
	r := startRoom(t, "-addr", ":0")
	eventually(t, "two lines", func() bool { return strings.Count(r.out.String(), "\n") == 2 })
	expect(t, regexp.MustCompile("^"+first+"$").MatchString(r.out.String()), "it prints %q, README.md %q", r.out.String(), transcript[1])
	links, err := net.Interfaces()
	must(t, err)
	for _, link := range links {
		addrs, _ := link.Addrs()
		for _, addr := range addrs {
			ip, _, err := net.ParseCIDR(addr.String())
			if err != nil || ip.To4() == nil || !ip.IsGlobalUnicast() || link.Flags&net.FlagRunning == 0 {
				continue
			}
			url := "http://" + ip.String() + r.url[strings.LastIndex(r.url, ":"):]
			expect(t, strings.Contains(r.out.String(), url), "it prints %q, want %s in it", r.out.String(), url)
		}
	}
	away := startRoom(t, "-redis", "localhost:"+freePort(t))
	eventually(t, "a word about Redis", func() bool {
		return strings.Contains(away.log.String(), "; start it, or leave -redis out for a room in memory\n")
	})
}

// The program needs no file but its own, not even for the time of $TZ.
func TestAloneInAFolder(t *testing.T) {
	t.Parallel()
	chroot := need(t, "chroot", "apt-get install coreutils")
	if runtime.GOOS != "linux" || os.Getuid() != 0 || testing.Short() {
		t.Skip("root on Linux alone can make a folder all there is; it builds once more")
	}
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "chat"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	succeeds(t, build)
	c := newClient(t, startCommand(t, []string{"TZ=Asia/Kathmandu"}, chroot, dir, "/chat").url)
	c.say("hi")
	clock := c.poll("")[0].data
	said, err := time.Parse("[15:04:05]", clock[:10])
	here := time.Now().UTC().Add(5*time.Hour + 45*time.Minute)
	late := (here.Unix() - said.Unix()) % (24 * 60 * 60)
	expect(t, err == nil && late <= 60, "at %v in Kathmandu it says %q, %v", here, clock, err)
}

func TestLikeliestAddress(t *testing.T) {
	at := func(ip string, shared, bridge bool) ownAddress {
		return ownAddress{netip.MustParseAddr(ip), shared, bridge}
	}
	wifi, cable := at("192.168.1.20", true, false), at("10.1.1.1", true, false)
	tunnel, docker := at("100.64.0.1", false, false), at("172.17.0.1", true, true)
	self, six, sixSelf := at("169.254.7.8", true, false), at("2001:db8::1", true, false), at("fe80::1", true, false)
	for _, c := range []struct {
		name string
		own  []ownAddress
		out  string
		v6   bool
		want string
	}{
		{"the one that leads out is first", []ownAddress{docker, cable, tunnel, wifi, six, sixSelf, self}, "192.168.1.20", true,
			"192.168.1.20 10.1.1.1 172.17.0.1 100.64.0.1"},
		{"a bridge that leads out", []ownAddress{cable, docker}, "172.17.0.1", true, "172.17.0.1 10.1.1.1"},
		{"a tunnel that leads out is for itself", []ownAddress{tunnel, cable}, "100.64.0.1", true, "10.1.1.1 100.64.0.1"},
		{"no way out", []ownAddress{docker, cable}, "", true, "10.1.1.1 172.17.0.1"},
		{"a switch without DHCP", []ownAddress{six, self, sixSelf}, "", true, "169.254.7.8"},
		{"a tunnel before what machines give themselves", []ownAddress{self, tunnel}, "", true, "100.64.0.1"},
		{"IPv6 alone", []ownAddress{sixSelf, six}, "", true, "2001:db8::1"},
		{"IPv6 alone, where the room is not", []ownAddress{sixSelf, six}, "", false, ""},
		{"only what nobody can type, and a way out", []ownAddress{sixSelf}, "192.168.1.20", true, "192.168.1.20"},
		{"links are not listed", nil, "192.168.1.20", true, "192.168.1.20"},
		{"nothing", nil, "", true, ""},
	} {
		same(t, strings.Join(likeliest(c.own, c.out, c.v6), " "), c.want, "%s", c.name)
	}
}

// A log whose reader has gone does not end the room.
func TestLogThatNobodyReads(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	must(t, err)
	r.Close()
	addr := "127.0.0.1:" + freePort(t)
	cmd := exec.Command(buildBinary(t), "-addr", addr, "-redis", "127.0.0.1:"+freePort(t))
	cmd.Stdout, cmd.Stderr = w, w
	must(t, cmd.Start())
	w.Close()
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	answered := func() bool {
		got, _ := newClient(t, "http://"+addr).try("GET", "/healthz", "")
		return strings.Contains(got.body, "cannot be reached") // so it has been logged
	}
	eventually(t, "the room to say that Redis is away", answered)
	expect(t, answered(), "the process is gone")
}

// ---- faults ----

// refused posts and fails unless the answer is 503 with a time to come back. It returns how long that took.
func (c *client) refused(text string) time.Duration {
	c.t.Helper()
	start := time.Now()
	got := c.attempt(text)
	expect(c.t, got.status == 503 && got.retryAfter(),
		"posting %q: got %d, Retry-After %q, want 503 with one", text, got.status, got.header.Get("Retry-After"))
	return time.Since(start)
}

// refusedAtOnce is refused by a room that knows that it would wait in vain.
func (c *client) refusedAtOnce(text string) {
	c.t.Helper()
	eventually(c.t, "a refusal at once", func() bool { return c.refused(text) < confirmTimeout })
}

// holds fails unless these rooms, and one that starts now, hold just this.
func (r *redisServer) holds(want []string, rooms ...*client) {
	r.t.Helper()
	for i, c := range append(rooms, newClient(r.t, r.room("-history", "4096").url)) {
		same(r.t, c.newcomer(), want, "room %d of %d holds", i+1, len(rooms)+1)
	}
}

// A fault is a way in which Redis cannot be used until it is mended.
type fault struct {
	name   string
	when   when
	breaks func(r *redisServer)
	mends  func(r *redisServer)
	saves  bool     // Redis, when one message of two has been said
	loses  bool     // it comes back with less than the rooms hold
	half   bool     // it published what it refused to keep, and the room that posted may not have heard it
	room   []string // arguments of the rooms
	url    string   // %s is host and port
	posts  bool     // Valkey tells it only to who posts
}

type when int

const (
	running  when = iota // under rooms that have joined
	starting             // before a room starts
	both
)

// does is a fault, or its end, that is one command.
func does(command string, args ...any) func(r *redisServer) {
	return func(r *redisServer) { r.do(command, args...) }
}

// The password in what must not be told is geheim.
var faults = []fault{
	{name: "kill -9 and an empty restart", when: both, loses: true, breaks: (*redisServer).kill, mends: (*redisServer).start},
	{name: "a restart from an older snapshot", loses: true, saves: true, breaks: (*redisServer).kill, mends: (*redisServer).start},
	{name: "kill -9 and a restart with its data", mends: (*redisServer).start,
		breaks: func(r *redisServer) {
			r.do("CONFIG", "SET", "appendfsync", "always", "appendonly", "yes")
			eventually(r.t, "the data to be on disk", func() bool {
				info, _ := redis.String(r.do("INFO", "persistence"), nil)
				return strings.Contains(info, "aof_rewrite_in_progress:0") && strings.Contains(info, "aof_rewrite_scheduled:0")
			})
			r.kill()
			r.args = append(r.args, "--appendonly", "yes")
		}},
	{name: "it stands still",
		breaks: func(r *redisServer) { r.signal("STOP") }, mends: func(r *redisServer) { r.signal("CONT") }},
	{name: "a script that does not end", mends: does("SCRIPT", "KILL"),
		breaks: func(r *redisServer) {
			r.do("CONFIG", "SET", "busy-reply-threshold", "100")
			go r.try("EVAL", "while true do end", 0)
			eventually(r.t, "Redis to be busy", func() bool {
				_, err := r.try("PING")
				return err != nil
			})
		}},
	{name: "writes are paused, as before a failover", breaks: does("CLIENT", "PAUSE", 60000, "WRITE"), mends: does("CLIENT", "UNPAUSE")},
	{name: "the list is a string (WRONGTYPE)", when: both, loses: true, half: true, breaks: does("SET", "chat:history", "x"), mends: does("DEL", "chat:history")},
	{name: "no memory left (OOM)", posts: true,
		breaks: does("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1"), mends: does("CONFIG", "SET", "maxmemory", "0")},
	{name: "no memory left (OOM), with a key that is not in Redis", posts: true, room: []string{"CHAT_KEY=one of our own"},
		breaks: does("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1"), mends: does("CONFIG", "SET", "maxmemory", "0")},
	{name: "a replica that lost its primary and still answers PING (READONLY)", when: both,
		breaks: does("REPLICAOF", "127.0.0.1", "1"), mends: does("REPLICAOF", "NO", "ONE")},
	{name: "another password, and everybody out",
		breaks: func(r *redisServer) { r.lock("geheim"); r.cut() }, mends: func(r *redisServer) { r.lock("") }},
	{name: "a wrong password", when: starting, url: "redis://:geheim@%s",
		breaks: func(r *redisServer) { r.lock("other") }, mends: func(r *redisServer) { r.lock("geheim") }},
	{name: "a missing password", when: starting,
		breaks: func(r *redisServer) { r.lock("geheim") }, mends: func(r *redisServer) { r.lock("") }},
	{name: "the channel is forbidden (ACL)",
		breaks: does("ACL", "SETUSER", "default", "resetchannels"), mends: does("ACL", "SETUSER", "default", "allchannels")},
	{name: "the list is forbidden (ACL)",
		breaks: does("ACL", "SETUSER", "default", "resetkeys"), mends: does("ACL", "SETUSER", "default", "allkeys")},
	{name: "a user who may not use the channel", when: starting, url: "redis://teacher:geheim@%s",
		breaks: does("ACL", "SETUSER", "teacher", "on", ">geheim", "allkeys", "allcommands", "resetchannels", "&chat"),
		mends:  does("ACL", "SETUSER", "teacher", "&chat:*")},
	{name: "the key is a list", when: starting, breaks: does("RPUSH", "chat:key", "x"), mends: does("DEL", "chat:key")},
	{name: "the key is empty", when: starting, breaks: does("SET", "chat:key", ""), mends: does("DEL", "chat:key")},
}

func TestRedisAway(t *testing.T) {
	t.Parallel()
	for _, test := range faults {
		if test.posts && strings.Contains(redisProgram, "valkey") {
			continue
		}
		if test.when != starting {
			t.Run(test.name, func(t *testing.T) { t.Parallel(); test.underRooms(t) })
		}
		if test.when != running {
			t.Run(test.name+", before a room starts", func(t *testing.T) { t.Parallel(); test.beforeStart(t) })
		}
	}
}

// underRooms breaks Redis under two rooms of which only the first is posted to. Both must say so, keep
// their readers, and heal when it is mended; then every message is there once, for those who read all
// the time and for who comes new.
func (test fault) underRooms(t *testing.T) {
	r := startRedis(t)
	rooms := []*program{r.room(test.room...), r.room(test.room...)}
	one := newClient(t, rooms[0].url).login("小明")
	two := one.at(rooms[1].url)
	streams := []*answer{one.stream("", ""), two.stream("", "")}
	one.say("one")
	if test.saves {
		r.do("SAVE")
	}
	one.say("two")
	for _, s := range streams {
		s.hears("小明: one", "小明: two")
	}

	test.breaks(r)
	one.refused("three")
	eventually(t, "the room that was posted to to say that Redis is away", func() bool { return !one.healthy() })
	eventually(t, "the other room to say so", func() bool { return !two.healthy() })
	for _, c := range []*client{one, two} {
		c.refusedAtOnce("never")
		got := c.get("/healthz")
		expect(t, got.status == 503 && len(strings.TrimSpace(got.body)) >= 10 && got.retryAfter(),
			"/healthz says %d %q, want 503, why, and Retry-After", got.status, got.body)
		heard := c.newcomer()
		same(t, heard[:min(2, len(heard))], []string{"one", "two"}, "while Redis is away a newcomer gets")
	}

	test.mends(r)
	eventually(t, "the rooms to heal", func() bool { return one.healthy() && two.healthy() })
	for range 2 { // each may have to join again, for what the other one wrote back
		one.insist("three")
		two.insist("three")
	}
	two.insist("four")
	all, most := []string{"one", "two", "three", "four"}, 1
	if test.half { // the other one has three, and may join last
		most = 2
	}
	for i, s := range streams {
		got := s.upTo("four")
		told, want := 0, all[2:]
		for at := slices.Index(got, "(gap)"); at >= 0; at = slices.Index(got, "(gap)") {
			expect(t, told > 0 || at == 0 || at == 1 && got[0] == "three", "before the gap reader %d was told %q", i+1, got[:at])
			got, told, want = got[at+1:], told+1, all // what a newcomer gets
		}
		same(t, got, want, "reader %d was told, behind %d gaps", i+1, told)
		expect(t, (told > 0) == test.loses && told <= most, "reader %d was told %d gaps, want one if Redis lost anything: %v", i+1, told, test.loses)
	}
	r.holds(all, one, two)
	wrote := written(t, rooms...)
	expect(t, wrote <= most && (wrote > 0) == test.loses, "the list was written back %d times, want once if Redis lost anything: %v", wrote, test.loses)
	for _, room := range rooms {
		got := room.changes()
		expect(t, got[0] == "joined" && got[1] == "away" && got[len(got)-1] == "joined" && len(got) <= 2+2*most,
			"it logged %q, want joined, away, joined", got)
	}
}

// written counts how often rooms have written the list back. But for that each may log, in turn, that
// it is joined and that Redis is away.
func written(t *testing.T, rooms ...*program) (n int) {
	t.Helper()
	for _, room := range rooms {
		at := 0
		for _, change := range room.changes() {
			if change == "wrote" {
				n++
			} else if at++; change != []string{"away", "joined"}[at%2] {
				t.Errorf("it logged %q", room.changes())
			}
		}
	}
	return n
}

// beforeStart starts a room on a Redis that cannot be used yet.
func (test fault) beforeStart(t *testing.T) {
	r := startRedis(t)
	test.breaks(r)
	line := newRelay(t, r.addr)
	room := startRoom(t, "-redis", fmt.Sprintf(cmp.Or(test.url, "redis://%s"), line.addr))
	c := newClient(t, room.url)
	early := c.stream("", "")
	eventually(t, "it to say so once", func() bool { return slices.Equal(room.changes(), []string{"away"}) })
	c.refusedAtOnce("early")
	got := c.get("/healthz")
	expect(t, got.status == 503 && regexp.MustCompile(`^redis is away: [a-z ]+\n$`).MatchString(got.body),
		"/healthz says %d %q, want 503 and no address", got.status, got.body)
	line.comes(2 * 3) // for three attempts, of two connections at most, that must not be logged
	room.changed("away")
	expect(t, !strings.Contains(room.log.String(), "start it"), "Redis answers, and the log says %q", room.log.String())
	expect(t, !strings.Contains(room.log.String()+room.out.String()+c.get("/healthz").body, "geheim"), "the password is told: %s", room.log.String())
	test.mends(r)
	room.joined()
	c.say("hello")
	same(t, early.upTo("hello"), []string{"hello"}, "who came before Redis was told")
	room.changed("away", "joined")
}

// TestRedisHiccups disturbs Redis in ways that pass by themselves, while both rooms are posted
// to with retries. No reader may notice more than a gap each time that the list was written back.
func TestRedisHiccups(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		disturb func(r *redisServer)
		loses   bool // what Redis holds
	}{
		{"FLUSHALL", func(r *redisServer) { r.do("FLUSHALL") }, true},
		{"the list is deleted", func(r *redisServer) { r.do("DEL", "chat:history") }, true},
		{"the list is cut", func(r *redisServer) { r.do("LTRIM", "chat:history", -2, -1) }, true},
		{"CLIENT KILL TYPE pubsub", func(r *redisServer) { r.do("CLIENT", "KILL", "TYPE", "pubsub") }, false},
		{"CLIENT KILL TYPE normal", func(r *redisServer) { r.do("CLIENT", "KILL", "TYPE", "normal") }, false},
		{"both", (*redisServer).cut, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			rooms := []*program{r.room(), r.room()}
			one := newClient(t, rooms[0].url)
			two := one.at(rooms[1].url)
			streams := []*answer{one.stream("", ""), two.stream("", "")}
			const each = 40
			together(2, func(i int) {
				for n := range each {
					if i == 0 && n == each/2 {
						test.disturb(r)
					}
					[]*client{one, two}[i].insist(fmt.Sprintf("%d-%02d", i, n))
				}
			})
			eventually(t, "both rooms to be joined", func() bool { return one.healthy() && two.healthy() })
			one.insist("last-but-one")
			two.insist("last")
			wrote := written(t, rooms...)
			expect(t, (wrote > 0) == test.loses, "the list was written back %d times, want that if Redis lost anything: %v", wrote, test.loses)
			var all []string
			for i, s := range streams {
				parts := betweenGaps(s.upTo("last"))
				all = parts[len(parts)-1] // behind the last gap comes all, here
				expect(t, len(parts) == wrote+1 && !slices.ContainsFunc(parts, doubled) && len(all) == 2*each+2 && !doubled(all),
					"reader %d was told %d gaps of %d, and then %d messages of %d, once, in one order: %q", i, len(parts)-1, wrote, len(all), 2*each+2, parts)
			}
			r.holds(all, one, two)
		})
	}
}

// TestAwayForLong cuts one room off for as many messages as everybody remembers, and for one
// more.
func TestAwayForLong(t *testing.T) {
	for missed, gap := range map[int]bool{4095: false, 4096: true, 6000: true} {
		t.Run(fmt.Sprint(missed, " messages"), func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			line := newRelay(t, r.addr)
			cutOff := startRoom(t, "-redis", line.addr, "-history", "4096").joined()
			c := newClient(t, r.room("-history", "4096").url)
			s := c.at(cutOff.url).stream("", "")
			c.say("before")
			s.upTo("before")
			line.cut()
			eventually(t, "the room to see that it is cut off", func() bool { return !c.at(cutOff.url).healthy() })
			r.announce(missed)
			line.mend()
			cutOff.joined()
			c.insist("after") // a busy machine may take its time with so many lines
			got := s.upTo("after")
			at := slices.Index(got, "(gap)")
			expect(t, gap && at == 0 || !gap && at < 0, "the gap is word %d of what it was told, want it first (0) or, without loss, none (-1)", at)
			parts := betweenGaps(got)
			expect(t, len(parts[len(parts)-1]) >= min(missed, 4096) && !doubled(got),
				"it was told %d messages, want the %d that are remembered", len(got), min(missed, 4096))
			cutOff.changed("joined", "away", "joined")
		})
	}
}

// TestStoppedForManyMegabytes stops a process until Redis gives up on its subscription.
func TestStoppedForManyMegabytes(t *testing.T) {
	r := startRedis(t)
	r.do("CONFIG", "SET", "client-output-buffer-limit", "pubsub 100kb 100kb 1")
	stopped := startProcess(t, "-redis", r.addr).joined()
	c := newClient(t, r.room().url)
	s := c.at(stopped.url).stream("", "")
	c.say("before")
	s.upTo("before")
	subscribers := func() int {
		list, _ := redis.String(r.do("CLIENT", "LIST", "TYPE", "pubsub"), nil)
		return strings.Count(list, "\n")
	}
	stopped.signal("STOP")
	text, n := strings.Repeat("字", 3990), 0
	for ; n < 900 || subscribers() > 1; n++ { // 10 MB at least
		require(t, n != 4000, "Redis keeps the subscription after 48 MB")
		key := nameKey(strconv.Itoa(n))
		eventually(t, "the other room to take it", func() bool { return c.postKey(key, fmt.Sprintf("%d %s", n, text)) == 204 })
	}
	stopped.signal("CONT")
	c.insist("after")
	got := s.upTo("after")
	for i, line := range got[:len(got)-1] {
		number, _, _ := strings.Cut(line, " ")
		require(t, number == strconv.Itoa(i), "message %d after it went on is %.20q", i, line)
	}
	same(t, len(got), n+1, "after it went on its reader")
	stopped.joined().changed("joined", "away", "joined")
}

// TestFullHistory joins a Redis that holds as much as it can: more than Redis keeps ready for a
// subscriber by default.
func TestFullHistory(t *testing.T) {
	r := startRedis(t)
	r.fill(ringSize, strings.Repeat("😀", 4000))
	c := newClient(t, r.room().url)
	within(t, 5*patience, "a list of 64 MB to be taken in", c.healthy)
	c.insist("newest")
	got := c.newcomer()
	expect(t, len(got) == 200 && got[199] == "newest", "a newcomer gets %d messages, want 200 up to the newest", len(got))
}

// TestSlowLink joins over a link on which the list takes longer than any single answer may, while
// another room is posted to.
func TestSlowLink(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 12 s")
	}
	t.Parallel()
	const rate, items = 200 << 10, 2400 // bytes a second, and so much that they take over joinTimeout
	r := startRedis(t)
	r.fill(items, strings.Repeat("x", int(rate*(joinTimeout+2*time.Second)/time.Second/items)))
	line := newRelay(t, r.addr)
	line.slow(rate)
	other := newClient(t, r.room("-history", "4096").url)
	start, room := time.Now(), startRoom(t, "-redis", line.addr, "-history", "4096")
	c := newClient(t, room.url)
	n := 0
	eventually(t, "the room to join", func() bool {
		other.say(fmt.Sprint("meanwhile ", n))
		n++
		return c.healthy()
	})
	took := time.Since(start)
	expect(t, took >= joinTimeout, "it joined after %v, so nothing is shown", took)
	other.say("last")
	got := c.stream("", "").upTo("last")
	want := other.newcomer()
	expect(t, slices.Equal(got, want[max(0, len(want)-len(got)):]) && len(got) == min(items+n+1, 4096),
		"a newcomer gets %d messages, and elsewhere %d, want the same %d", len(got), len(want), min(items+n+1, 4096))
	room.changed("joined")
}

// TestLateAttempts has three rooms try the same message, and one of them many others, on a Redis that
// stands still. When it goes on all the attempts run, and each message is there once, in one order.
func TestLateAttempts(t *testing.T) {
	t.Parallel()
	const others = 3 * batchSize
	r := startRedis(t)
	var at []*client
	var streams []*answer
	for range 3 {
		at = append(at, newClient(t, r.room().url))
		streams = append(streams, at[len(at)-1].stream("", ""))
	}
	at[0].say("before")
	r.signal("STOP")
	var posts sync.WaitGroup
	for i := range others {
		posts.Go(func() { at[0].insist(fmt.Sprintf("post-%03d", i)) })
	}
	together(9, func(i int) { at[i%3].refused("late") })
	r.signal("CONT")
	posts.Wait()
	eventually(t, "the late attempts to run", func() bool {
		copies := slices.DeleteFunc(r.texts(), func(text string) bool { return text != "late" })
		return len(copies) > 1
	})
	for _, c := range at {
		c.insist("late")
	}
	at[1].insist("after")
	var all []string
	for i, s := range streams {
		got := s.upTo("after")
		expect(t, (i == 0 || slices.Equal(got, all)) && len(got) == others+3 && !doubled(got),
			"at room %d it was %q, and before it %q, want each of %d once, in one order", i, got, all, others+3)
		all = got
	}
	r.holds(all, at...)
}

// TestShutdownWithoutRedis: at the end who waits for Redis is told, and a process that waits for the list
// does not.
func TestShutdownWithoutRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	line := newRelay(t, r.addr)
	held := line.holdBefore(wantsList)
	joining := startRoom(t, "-redis", line.addr)
	eventually(t, "the list to be asked for", held)
	room := r.room()
	r.signal("STOP")
	var waiting []*bufio.Reader
	for range 3 { // one waits to be confirmed, the others to be sent
		const body = "message=at shutdown"
		conn, in := halfPost(t, room.url, body)
		io.WriteString(conn, body)
		waiting = append(waiting, in)
	}
	eventually(t, "a post to be sent", func() bool { return r.unread() > 0 })
	start := time.Now()
	room.interrupt()
	for _, in := range waiting { // each is told: a connection that is cut off gives no answer
		resp, err := http.ReadResponse(in, nil)
		expect(t, err == nil && resp.StatusCode == 503, "a post that waits at shutdown: got %v, %v, want 503", resp, err)
	}
	for _, p := range []*program{room, joining} {
		err := p.stop()
		expect(t, err == nil && time.Since(start) <= 10*time.Second, "it ended with %v after %v, want nil at once", err, time.Since(start))
	}
	r.signal("CONT")
}

// TestAnswerOfExecLost breaks a room's connections to Redis when EXEC has run and before its
// answer is back.
func TestAnswerOfExecLost(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	line := newRelay(t, r.addr)
	room := startRoom(t, "-redis", line.addr).joined()
	c := newClient(t, room.url)
	s := c.stream("", "")
	c.say("before")
	line.breakAfter(nameKey("lost"))
	c.refused("lost")
	eventually(t, "EXEC to have run", func() bool { return len(r.history()) == 2 })
	eventually(t, "the room to join again", func() bool { return len(room.changes()) == 3 })
	for range 2 {
		c.sayAs(nameKey("lost"), "lost")
	}
	c.say("after")
	want := []string{"before", "lost", "after"}
	same(t, s.upTo("after"), want, "its reader was told")
	same(t, r.texts(), want, "the list holds")
	room.changed("joined", "away", "joined")
}

// TestForgottenWhileCutOff has one room cut off while another takes a message, and Redis come
// back empty to the first alone. Nobody may miss that message, or not be told.
func TestForgottenWhileCutOff(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	toOne, toTwo := newRelay(t, r.addr), newRelay(t, r.addr)
	one := newClient(t, startRoom(t, "-redis", toOne.addr).joined().url)
	two := one.at(startRoom(t, "-redis", toTwo.addr).joined().url)
	stays, other := one.stream("", ""), two.stream("", "")
	one.say("before")
	toOne.hold()
	two.say("missed")
	other.upTo("missed")
	r.kill()
	toTwo.cut()
	toOne.cut()
	toOne.release()
	r.start()
	toOne.mend()
	last := one.insist("new")
	same(t, stays.upTo("new"), []string{"before", "(gap)", "before", "new"}, "at the first room it is")
	toTwo.mend()
	eventually(t, "the second room to be back", two.healthy)
	goesOver := two.stream("", last)
	eventually(t, "the first room to have it all", func() bool { return slices.Contains(one.newcomer(), "missed") })
	two.insist("after")
	all := two.newcomer()
	same(t, slices.Sorted(slices.Values(all)), []string{"after", "before", "missed", "new"}, "the room holds")
	for name, s := range map[string]*answer{"who stayed": stays, "who went to the second room": goesOver, "of the second room": other} {
		parts := betweenGaps(s.upTo("after"))
		same(t, parts[len(parts)-1], all, "a reader %s", name)
	}
	r.holds(all, one)
}

// TestPostWhileListIsWritten has a room write back what Redis forgot, and another take a
// message between its reading of the list and its writing.
func TestPostWhileListIsWritten(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	line := newRelay(t, r.addr)
	one := newClient(t, startRoom(t, "-redis", line.addr).joined().url)
	one.say("before")
	line.cut()
	r.do("DEL", "chat:history")
	two := one.at(r.room().url)
	writing := line.holdBefore("DEL")
	line.mend()
	eventually(t, "the first room to begin writing", writing)
	two.say("meanwhile")
	line.release()
	eventually(t, "the first room to be back", one.healthy)
	r.holds([]string{"before", "meanwhile"}, one)
}

// TestOneOfThreeKilled kills a process; its reader and its writer go to the others.
func TestOneOfThreeKilled(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	killed := startProcess(t, "-redis", r.addr).joined()
	c := newClient(t, killed.url).login("小明")
	others := []*client{c.at(r.room().url), c.at(r.room().url)}
	hopping := c.stream("", "")
	c.insist("one")
	last := hopping.message().id
	killed.kill()
	hopping.until("end")
	for _, c := range others {
		c.sayAs(nameKey("one"), "again")
		c.say("two", "three")
		s := c.stream("", last)
		s.hears("小明: two")
		last = s.message().id
	}
}

// TestTerminatedWhilePosting sends SIGTERM while twenty writers post. What was answered 204 is
// in the room; what was not is sent again to another process, and then is there once as well.
func TestTerminatedWhilePosting(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	other := newClient(t, r.room("-history", "4096").url)
	want := 0
	for round := range 3 {
		p := startProcess(t, "-redis", r.addr).joined()
		c := newClient(t, p.url)
		c.stream("", "").until("ping")
		var accepted atomic.Int64
		together(21, func(i int) {
			if i == 20 {
				eventually(t, "messages to flow", func() bool { return accepted.Load() > 100 })
				p.signal("TERM")
				same(t, p.wait(patience), nil, "SIGTERM in the middle of posts")
				return
			}
			for n := 0; ; n++ {
				name := fmt.Sprintf("%d-%d-%d", round, i, n)
				got := c.attempt(name).status
				expect(t, got == 204 || got == 503 || got == 0, "a post at shutdown: got %d, want 204, 503 or no answer", got)
				if accepted.Add(1); got != 204 {
					other.sayAs(nameKey(name), name)
					return
				}
			}
		})
		want += int(accepted.Load())
		p.changed("joined")
	}
	got := other.newcomer()
	expect(t, len(got) == want && !doubled(got), "the room holds %d messages, want the %d accepted at first or later, each once", len(got), want)
}

// A relay passes bytes between clients and a server, and does to them what networks do.
type relay struct {
	t            testing.TB
	addr, target string

	mu     sync.Mutex
	conns  map[net.Conn]bool
	off    bool          // it takes no connections
	late   bool          // it passes on an answer only when that has ended
	held   chan struct{} // when not nil, nothing passes until this is closed,
	half   bool          // or no answer
	stop   []byte        // when not nil, a request that holds this makes it hold
	word   []byte        // when not nil, a request that holds this makes it deaf
	real   []byte        // when not nil, this in an answer
	forged []byte        // begins like this instead
	deaf   bool          // the next bytes of the server end all connections instead
	came   int           // connections that clients have made
	rate   int           // bytes of answers a second, over all connections; 0: as they come
	free   time.Time     // when what has passed at this rate is through
}

// wantsList is in what a process sends that asks for the list: LRANGE chat:history 0 -1.
const wantsList = "\r\n0\r\n$2\r\n-1\r\n"

// newRelay starts one that passes everything on.
func newRelay(t testing.TB, target string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	r := &relay{t: t, addr: l.Addr().String(), target: target, conns: map[net.Conn]bool{}}
	t.Cleanup(func() {
		l.Close()
		r.release()
		r.cut()
	})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			r.do(func() { r.came++ })
			go r.pass(client)
		}
	}()
	return r
}

// do changes the relay.
func (r *relay) do(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

// cut ends all connections; new ones are ended at once, until mend.
func (r *relay) cut() {
	r.do(func() {
		r.off = true
		for c := range r.conns {
			c.Close()
		}
	})
}

func (r *relay) mend() { r.do(func() { r.off = false }) }

// hold lets nothing pass, and no end of a connection either, until release.
func (r *relay) hold() { r.do(func() { r.held, r.half = make(chan struct{}), false }) }

// holdAnswers lets nothing of the server's pass until release.
func (r *relay) holdAnswers() { r.do(func() { r.held, r.half = make(chan struct{}), true }) }

// holdBefore holds as soon as somebody asks for word, which does not pass. It returns what
// tells whether that is so.
func (r *relay) holdBefore(word string) (held func() bool) {
	r.do(func() { r.stop = []byte(word) })
	return func() (held bool) {
		r.do(func() { held = r.held != nil })
		return held
	}
}

func (r *relay) release() {
	r.do(func() {
		if r.held != nil {
			close(r.held)
			r.held = nil
		}
	})
}

// holdBack has answers pass only when they have ended.
func (r *relay) holdBack() { r.do(func() { r.late = true }) }

// slow lets answers pass at so many bytes a second.
func (r *relay) slow(rate int) { r.do(func() { r.rate = rate }) }

// forge has an answer that holds some bytes begin there with others, which are no more.
func (r *relay) forge(real, forged string) {
	r.do(func() { r.real, r.forged = []byte(real), []byte(forged) })
}

// breakAfter ends all connections once, when word has gone to the server and its answer comes.
func (r *relay) breakAfter(word string) { r.do(func() { r.word = []byte(word) }) }

// comes waits until clients have made n more connections.
func (r *relay) comes(n int) {
	r.t.Helper()
	r.do(func() { n += r.came })
	eventually(r.t, "connections", func() (come bool) {
		r.do(func() { come = r.came >= n })
		return come
	})
}

// keep takes note of a connection, or ends it.
func (r *relay) keep(c net.Conn) (kept bool) {
	r.do(func() {
		if kept = !r.off; kept {
			r.conns[c] = true
		} else {
			c.Close()
		}
	})
	return kept
}

func (r *relay) drop(c net.Conn) {
	r.do(func() { delete(r.conns, c) })
	c.Close()
}

func (r *relay) pass(client net.Conn) {
	if !r.keep(client) {
		return
	}
	defer r.drop(client)
	server, err := net.Dial("tcp", r.target)
	if err != nil || !r.keep(server) {
		return
	}
	defer r.drop(server)
	go func() {
		defer client.Close()
		r.copy(client, server, true)
	}()
	r.copy(server, client, false)
}

// copy passes on what comes from a side until that ends.
func (r *relay) copy(to, from net.Conn, answer bool) {
	var kept []byte
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		passes, late := r.lets(buf[:n], answer)
		if !passes {
			return
		}
		kept = append(kept, buf[:n]...)
		if err == nil && late {
			continue
		}
		if _, failed := to.Write(kept); err != nil || failed != nil {
			return
		}
		kept = kept[:0]
	}
}

// lets waits while the relay is held, and reports whether these bytes may pass, and whether
// only with all that follows.
func (r *relay) lets(chunk []byte, answer bool) (passes, late bool) {
	var held chan struct{}
	var free time.Time
	r.do(func() {
		if !answer {
			if r.stop != nil && bytes.Contains(chunk, r.stop) {
				r.stop, r.held, r.half = nil, make(chan struct{}), false
			}
			if r.word != nil && bytes.Contains(chunk, r.word) {
				r.word, r.deaf = nil, true
			}
		}
		if at := bytes.Index(chunk, r.real); answer && r.real != nil && at >= 0 {
			copy(chunk[at:], r.forged)
		}
		if answer || !r.half {
			held = r.held
		}
		passes, late = true, answer && r.late
		if answer && r.deaf && len(chunk) > 0 {
			passes, r.deaf = false, false
			for c := range r.conns {
				c.Close()
			}
		}
		if answer && r.rate > 0 {
			if now := time.Now(); r.free.Before(now) {
				r.free = now
			}
			r.free = r.free.Add(time.Duration(len(chunk)) * time.Second / time.Duration(r.rate))
			free = r.free
		}
	})
	if held != nil {
		<-held
	}
	time.Sleep(time.Until(free))
	return passes, late
}

// ---- hosting ----

// A testName is what the name server of the tests knows of a name. That one stands in front of the
// machine's own for all tests, none of which asks for a name beyond this machine.
type testName struct {
	addrs []string
	late  time.Duration // before each answer
	lost  atomic.Int64  // questions that get none
}

var testNames sync.Map // name → *testName

func init() {
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		c, server := net.Pipe()
		go func() {
			defer server.Close()
			answerName(server)
		}()
		return c, nil
	}}
}

// answerName answers one question of the DNS (RFC 1035, section 4), with the length before it.
func answerName(c net.Conn) {
	header := make([]byte, 2+12)
	if _, err := io.ReadFull(c, header); err != nil {
		return
	}
	asked := make([]byte, int(header[0])<<8+int(header[1])-12)
	if _, err := io.ReadFull(c, asked); err != nil {
		return
	}
	end, labels := 0, []string(nil)
	for ; asked[end] > 0; end += 1 + int(asked[end]) {
		labels = append(labels, string(asked[end+1:][:asked[end]]))
	}
	kind, code, answers := asked[end+2], byte(3), []byte(nil) // 3: there is no such name
	if known, ok := testNames.Load(strings.Join(labels, ".")); ok {
		name := known.(*testName)
		if code = 0; name.lost.Add(-1) >= 0 {
			io.Copy(io.Discard, c) // until who asks gives up
			return
		}
		time.Sleep(name.late)
		for _, addr := range name.addrs {
			if kind == 1 { // A
				answers = append(answers, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
				answers = append(answers, net.ParseIP(addr).To4()...)
			}
		}
	}
	message := append([]byte{header[2], header[3], 0x81, 0x80 | code, 0, 1, 0, byte(len(answers) / 16), 0, 0, 0, 0}, asked[:end+5]...)
	message = append(message, answers...)
	c.Write(append([]byte{0, byte(len(message))}, message...))
}

// TestRedisByName joins a Redis whose name is hard to find out, or has an address where nobody answers. The
// machine's name server here is one, which is asked twice, and 5 s are what each question may take.
func TestRedisByName(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 20 s")
	}
	t.Parallel()
	r := startRedis(t)
	_, port, _ := strings.Cut(r.addr, ":")
	dead := "127.0.0.2:" + port // full, so that it does not even refuse
	full := launch(t, exec.Command(redisProgram, "--bind", "127.0.0.2", "--port", port, "--tcp-backlog", "1", "--save", ""))
	if !full.comesUp(func() bool { return listens(dead) }) {
		t.Skipf("this system has no 127.0.0.2: %s", full.out.String())
	}
	full.signal("STOP")
	for err := error(nil); err == nil; {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", dead, time.Second/2); err == nil {
			t.Cleanup(func() { c.Close() })
		}
	}
	for name, test := range map[string]struct {
		addrs []string
		late  time.Duration
		lost  int64  // A and AAAA are asked for at once
		says  string // why it never joins
	}{
		"the first of two addresses refuses":         {addrs: []string{"127.0.0.3", "127.0.0.1"}},
		"the first of two addresses is dead":         {addrs: []string{"127.0.0.2", "127.0.0.1"}},
		"the name comes after 2.5 s":                 {addrs: []string{"127.0.0.1"}, late: 2500 * time.Millisecond},
		"the first question is lost":                 {addrs: []string{"127.0.0.1"}, lost: 2},
		"both, a lost question and a dead address":   {addrs: []string{"127.0.0.2", "127.0.0.1"}, lost: 2},
		"all addresses are dead":                     {addrs: []string{"127.0.0.2"}, says: "redis is away, trying again until it answers: dial tcp " + dead + ": i/o timeout\n"},
		"no name server answers":                     {lost: math.MaxInt32, says: `redis is away, trying again until it answers: no name server answers for "NAME"` + "\n"},
		"nobody knows the name":                      {says: "no such host\n"},
		"the only address refuses, so it is told to": {addrs: []string{"127.0.0.3"}, says: "connection refused; start it, or leave -redis out for a room in memory\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host := strings.ToLower(regexp.MustCompile(`[^a-z]+`).ReplaceAllString(name, "-")) + ".test"
			if known := (&testName{addrs: test.addrs, late: test.late}); name != "nobody knows the name" {
				known.lost.Store(test.lost)
				testNames.Store(host, known)
			}
			room := startRoom(t, "-redis", host+":"+port)
			if test.says == "" {
				room.joined().changed("joined")
				newClient(t, room.url).say("hello")
				return
			}
			want := strings.ReplaceAll(test.says, "NAME", host)
			eventually(t, "it to say why", func() bool { return strings.Contains(room.log.String(), "redis is") })
			if log := room.log.String(); !strings.HasSuffix(log, want) {
				t.Errorf("it logged %q, want %q", log, want)
			}
		})
	}
}

// TestIdleConnectionsEnded: Redis ends connections on which nothing has come for 10 s. An idle room that
// keeps no key in Redis stays joined, and can be posted to.
func TestIdleConnectionsEnded(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	t.Parallel()
	r := startRedis(t, "--timeout", "10")
	room := r.room("CHAT_KEY=one of our own")
	idle, err := net.Dial("tcp", r.addr)
	must(t, err)
	defer idle.Close()
	idle.SetReadDeadline(time.Now().Add(patience))
	if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("an idle connection: got %v, want that Redis ends it", err)
	}
	newClient(t, room.url).say("hello")
	room.changed("joined")
}

// TestNoMoreClients: Redis says that it has too many clients, and hangs up. What counts is what it
// said, also where the first that a room sends is a transaction, since it has a key of its own.
func TestNoMoreClients(t *testing.T) {
	t.Parallel()
	r := startRedis(t, "--maxclients", "8")
	for taken, err := 0, error(nil); err == nil; taken++ {
		c, _ := redis.Dial("tcp", r.addr)
		t.Cleanup(func() { c.Close() })
		_, err = c.Do("PING")
		require(t, taken <= 100, "Redis takes everybody")
	}
	for _, key := range []string{"CHAT_KEY=", "CHAT_KEY=one of our own"} {
		line := newRelay(t, r.addr)
		room := startRoom(t, "-redis", line.addr, key)
		line.comes(2 * 3) // for three attempts
		log := room.log.String()
		expect(t, strings.HasSuffix(log, `answers: "ERR max number of clients reached"`+"\n") && strings.Count(log, "\n") == 1,
			"with %s it logged %q, want what Redis said, once", key, log)
		same(t, newClient(t, room.url).get("/healthz").body, "redis is away: it refuses\n", "/healthz says")
	}
}

// TestLeastRights runs the room with the line of rights in running.md: to post, to read what was said
// before, the word every 5 s, to write back. And without any of these rights the log says so.
func TestLeastRights(t *testing.T) {
	t.Parallel()
	line := strings.TrimSpace(blocks(t, "acl")[0])
	user, address := strings.Fields(line)[1], regexp.MustCompile("`REDIS_URL=(redis://[^`]*)`").FindStringSubmatch(readFile(t, ".github/running.md"))
	require(t, address != nil, "running.md names no REDIS_URL")
	// Each right is one room's, which lacks just that. Only two at once need UNWATCH.
	users, lacks := line+"\n", map[string]string{}
	for _, right := range regexp.MustCompile(`[+~&]\S+`).FindAllString(line, -1) {
		if room := fmt.Sprintf("room%02d", len(lacks)); right != "+unwatch" {
			lacks[room] = strings.ReplaceAll(right, user, room)
			users += strings.ReplaceAll(strings.ReplaceAll(line+" ", " "+right+" ", " "), user, room) + "\n"
		}
	}
	r := startRedis(t, "--aclfile", writeFile(t, filepath.Join(t.TempDir(), "users.acl"), users))
	login := func(name string) string {
		u, _ := url.Parse(address[1])
		u.Host = r.addr
		return strings.ReplaceAll(u.String(), user, name)
	}
	first := startRoom(t, "-redis", login(user)).joined()
	newClient(t, first.url).say("hello")
	rooms := map[string]*program{}
	for name := range lacks {
		rooms[name] = startRoom(t, "-redis", login(name), "-channel", name)
	}
	denied := func(name string) bool { return strings.Contains(rooms[name].log.String(), "NOPERM ") }
	for name, room := range rooms {
		c := newClient(t, room.url)
		eventually(t, "a room without "+lacks[name]+" to join or not", func() bool { return denied(name) || c.post("hello") == 204 })
	}
	r.do("FLUSHALL")
	r.cut()
	for name := range rooms {
		eventually(t, "a room without "+lacks[name]+" to say so", func() bool { return denied(name) })
	}
	eventually(t, "a word to have gone out", func() bool { return r.do("TTL", user+":history").(int64) > 0 })
	first.joined().changed("joined", "away", "wrote", "joined")
	first.stop()
	same(t, newClient(t, startRoom(t, "-redis", login(user)).joined().url).newcomer(), []string{"hello"}, "after a restart the room holds")
}

// TestRedisTLS: what the log says of a Redis behind TLS whose certificate, its own authority, is trusted, is not,
// or cannot be.
func TestRedisTLS(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("SSL_CERT_FILE counts on Linux")
	}
	hour := time.Now().Add(time.Hour)
	for name, test := range map[string]struct {
		names   string // for which the certificate is
		until   time.Time
		scheme  string
		plain   bool   // the port without TLS
		unknown bool   // it is not in SSL_CERT_FILE
		clients string // whether Redis wants certificates from them
		says    string // nothing: the room joins
	}{
		"trusted":                             {names: "localhost", until: hour},
		"not trusted":                         {names: "localhost", until: hour, unknown: true, says: "tls: failed to verify certificate: x509: certificate signed by unknown authority"},
		"of another name":                     {names: "other.test", until: hour, says: "tls: failed to verify certificate: x509: certificate is valid for other.test, not localhost"},
		"expired":                             {names: "localhost", until: time.Now().Add(-time.Hour), says: "tls: failed to verify certificate: x509: certificate has expired or is not yet valid"},
		"and one is wanted, Debian's default": {names: "localhost", until: hour, clients: "yes", says: "remote error: tls: certificate required"},
		"TLS at a port without":               {names: "localhost", until: hour, plain: true, says: "TLS handshake timeout"},
		"no TLS at a port with":               {names: "localhost", until: hour, scheme: "redis", says: hungUp + "; perhaps TLS is on one side only"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cert, key := selfSigned(t, func(c *x509.Certificate) {
				c.DNSNames, c.NotAfter, c.IsCA, c.BasicConstraintsValid = []string{test.names}, test.until, true, true
			})
			port := freePort(t)
			r := startRedis(t, "--tls-port", port, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert,
				"--tls-auth-clients", cmp.Or(test.clients, "no"))
			if test.plain {
				_, port, _ = strings.Cut(r.addr, ":")
			}
			line, trusted := newRelay(t, "127.0.0.1:"+port), cert
			if test.unknown {
				trusted, _ = selfSigned(t)
			}
			_, port, _ = strings.Cut(line.addr, ":")
			room := startProcess(t, "-redis", cmp.Or(test.scheme, "rediss")+"://localhost:"+port, "SSL_CERT_FILE="+trusted)
			if test.says == "" {
				room.joined()
				newClient(t, room.url).say("hello")
				return
			}
			line.comes(2 * 3) // for three attempts, of which one is told
			log := room.log.String()
			expect(t, strings.Contains(log, "answers: "+test.says) && strings.Count(log, "\n") == 1, "it logged %q, want %q, once", log, test.says)
		})
	}
}

// TestCluster runs the room in a cluster of one node and of three, where its keys have to be in one slot.
// Else, or at a node without that slot, the log says so, once.
func TestCluster(t *testing.T) {
	t.Parallel()
	for size, others := range map[int]string{1: "CROSSSLOT", 3: "MOVED"} {
		t.Run(fmt.Sprint(size, " nodes"), func(t *testing.T) {
			t.Parallel()
			const slots = 1 << 14
			var nodes []*redisServer
			for i := range size {
				r := startRedis(t, "--cluster-enabled", "yes", "--cluster-port", freePort(t))
				r.do("CLUSTER", "ADDSLOTSRANGE", i*slots/size, (i+1)*slots/size-1)
				nodes = append(nodes, r)
				host, port, _ := net.SplitHostPort(nodes[0].addr)
				r.do("CLUSTER", "MEET", host, port, nodes[0].args[len(nodes[0].args)-1])
			}
			eventually(t, "the cluster to be one", func() bool {
				return !slices.ContainsFunc(nodes, func(r *redisServer) bool {
					info, _ := redis.String(r.do("CLUSTER", "INFO"), nil)
					return !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, fmt.Sprint("cluster_known_nodes:", size, "\r"))
				})
			})
			slot, _ := redis.Int(nodes[0].do("CLUSTER", "KEYSLOT", "{chat}:key"), nil)
			at := slot * size / slots
			room := nodes[at].room("-channel", "{chat}")
			c := newClient(t, room.url)
			c.say("hello")
			nodes[at].do("FLUSHALL")
			nodes[at].cut()
			eventually(t, "the room to write back", func() bool { return strings.Contains(room.log.String(), "written back") })
			c.insist("again")
			room.changed("joined", "away", "wrote", "joined")
			same(t, newClient(t, nodes[at].room("-channel", "{chat}").url).newcomer(), []string{"hello", "again"}, "another room at this node holds")
			channel := "chat"
			if size > 1 {
				channel = "{chat}"
			}
			line := newRelay(t, nodes[(at+1)%size].addr)
			lost := startRoom(t, "-redis", line.addr, "-channel", channel)
			line.comes(2 * 3) // for three attempts, of which one is told
			want := `answers: this Redis is a cluster: name the node that has the room, whose keys -channel '{chat}' keeps together: "` + others
			if log := lost.log.String(); !strings.Contains(log, want) || strings.Count(log, "\n") != 1 || size > 1 && !strings.Contains(log, nodes[at].addr) {
				t.Errorf("it logged %q, want %s, once", log, want)
			}
		})
	}
}

// TestFailover runs running.md's block for haproxy in front of a master and its replica. The master is
// killed under load, and the replica promoted: with all that was said, or without the newest. Nothing that
// was acknowledged may be missing or there twice, and what the replica lacked is told by a gap. Nor does the
// old master, which comes back as one, part the room.
func TestFailover(t *testing.T) {
	t.Parallel()
	haproxy := need(t, "haproxy", "apt-get install haproxy")
	for name, lags := range map[string]bool{"the replica has it all": false, "the replica lags": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			master := startRedis(t, "--repl-diskless-sync-delay", "0")
			line := newRelay(t, master.addr)
			host, port, _ := net.SplitHostPort(line.addr)
			replica := startRedis(t, "--replicaof", host+" "+port)
			eventually(t, "the replica to follow", func() bool {
				info, _ := redis.String(replica.do("INFO", "replication"), nil)
				return strings.Contains(info, "master_link_status:up")
			})
			addr, proxy := serve(t, func(addr string) *exec.Cmd {
				conf := adapt(t, blocks(t, "haproxy")[0], "127.0.0.1:6379", addr, "10.0.0.1:6379", master.addr, "10.0.0.2:6379", replica.addr)
				return exec.Command(haproxy, "-db", "-f", writeFile(t, filepath.Join(t.TempDir(), "haproxy.cfg"), conf))
			})
			sees := func(what string) {
				t.Helper()
				eventually(t, "the proxy to see that "+what, func() bool { return strings.Contains(proxy.log.String(), "Server redis/"+what) })
			}
			sees("two is DOWN")
			rooms := []*program{startRoom(t, "-redis", addr, "-history", "4096").joined(), startRoom(t, "-redis", addr, "-history", "4096").joined()}
			at := []*client{newClient(t, rooms[0].url), newClient(t, rooms[1].url)}
			streams := []*answer{at[0].stream("", ""), at[1].stream("", "")}
			var accepted atomic.Int64
			var dead, back atomic.Bool
			together(5, func(i int) {
				if i < 4 {
					for n := 0; !back.Load(); n++ {
						at[i%2].insist(fmt.Sprintf("%d-%04d", i, n))
						accepted.Add(1)
						if dead.Load() { // what follows need not be much
							time.Sleep(10 * time.Millisecond)
						}
					}
					return
				}
				more := func(n int64) {
					n += accepted.Load()
					eventually(t, "messages to flow", func() bool { return accepted.Load() > n })
				}
				more(200)
				if lags {
					line.hold()
					more(20)
				}
				start := time.Now()
				master.kill()
				dead.Store(true)
				line.cut()
				line.release()
				replica.do("REPLICAOF", "NO", "ONE")
				more(20)
				eventually(t, "both rooms to be back", func() bool { return at[0].healthy() && at[1].healthy() })
				t.Logf("%d acknowledged, healthy after %v", accepted.Load(), time.Since(start).Round(time.Millisecond))
				master.start() // and is a master still
				sees("one is UP")
				for range 3 {
					replica.cut()
					more(20)
				}
				back.Store(true)
			})
			at[0].insist("last-but-one")
			at[1].insist("last")
			all := at[1].newcomer()
			expect(t, len(all) == int(accepted.Load())+2 && !doubled(all),
				"the room holds %d messages, want the %d that were acknowledged, each once", len(all), accepted.Load()+2)
			wrote := written(t, rooms...)
			expect(t, !lags || wrote != 0, "the replica lacked nothing, so nothing is shown")
			for i, s := range streams {
				parts := betweenGaps(s.upTo("last")) // two that come together are told as one
				gaps, got := len(parts)-1, parts[len(parts)-1]
				expect(t, gaps <= wrote && gaps >= min(wrote, 1) && slices.Equal(got, all),
					"reader %d was told %d gaps of %d, and then %d messages of %d in one order", i, gaps, wrote, len(got), len(all))
			}
			if got := at[0].newcomer(); !slices.Equal(got, all) {
				t.Errorf("the first room holds %d messages, the second %d, want the same", len(got), len(all))
			}
			same(t, master.do("EXISTS", "chat:history", "chat:key"), any(int64(0)), "the old master, which came back empty, has")
		})
	}
}

// TestCommandsOfAnIdleRoom: what running.md says that a Redis counts.
func TestCommandsOfAnIdleRoom(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 25 s")
	}
	t.Parallel()
	r := startRedis(t)
	c, words := newClient(t, r.room().url), r.listen("chat:probe")
	commands := func() (n int) {
		stats, _ := redis.String(r.do("INFO", "commandstats"), nil)
		for _, calls := range regexp.MustCompile(`cmdstat_([^:]+):calls=(\d+)`).FindAllStringSubmatch(stats, -1) {
			if one, _ := strconv.Atoi(calls[2]); calls[1] != "info" {
				n += one
			}
		}
		return n
	}
	next(t, words)
	next(t, words) // of the join, and of a round trip before there is a list to be kept
	c.say("hello")
	next(t, words)
	next(t, words)
	seconds, _ := redis.Int(r.do("TTL", "chat:history"), nil)
	expect(t, seconds > int(keptFor.Seconds())-60, "the list is kept for %d s", seconds)
	before := commands()
	next(t, words)
	idle := commands() - before
	c.say("hello")
	post := commands() - before - idle
	every := int(syncEvery / time.Second)
	want := fmt.Sprintf("counts %d a minute for an idle process (%d every %d s) and %d for a post", idle*60/every, idle, every, post)
	expect(t, strings.Contains(inOneLine(readFile(t, ".github/running.md")), want), "running.md does not say that it %s", want)
}

// TestWhatIsLoggedWhileAway: of a Redis that is away for long, one line at the start, one for each other
// reason however many attempts meet it, and at the end how long it took, and what was written back.
func TestWhatIsLoggedWhileAway(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	room := r.room()
	newClient(t, room.url).say("one", "two")
	logged := func(words string) {
		t.Helper()
		eventually(t, "it to log "+words, func() bool { return strings.Contains(room.log.String(), words) })
	}
	r.kill()
	logged("refused")
	r.args = append(r.args, "--requirepass", "geheim")
	r.password = "geheim"
	r.start()
	logged("NOAUTH")
	eventually(t, "three more attempts", func() bool {
		stats, _ := redis.String(r.do("INFO", "commandstats"), nil)
		return regexp.MustCompile(`rejected_calls=([3-9]|\d\d)`).MatchString(stats)
	})
	r.do("CONFIG", "SET", "requirepass", "")
	r.password = ""
	room.joined()
	want := regexp.MustCompile(strings.ReplaceAll(`^@redis is joined, 0 messages held
@redis is away, trying again until it answers: it has ended the connection
@redis is still away: dial tcp `+r.addr+`: connect: connection refused
@redis is still away: "NOAUTH Authentication required."
@redis had forgotten; the history was written back, 3 messages
@redis is joined after [\d.]+m?s, 3 messages held
$`, "@", `[\d/]{10} [\d:]{8} `))
	if log := room.log.String(); !want.MatchString(log) {
		t.Errorf("it logged\n%swant\n%s", log, want)
	}
}

// ---- model ----

// TestReconcile: a, b, c … are messages; a2 is a with the tail of another attempt; a.f is a foreign
// line behind a; G is a gap. A log holds four.
func TestReconcile(t *testing.T) {
	id := func(name string) string {
		name, foreign, _ := strings.Cut(name, ".")
		tail := "aaaaaaaa"
		if base, second := strings.CutSuffix(name, "2"); second {
			name, tail = base, "bbbbbbbb"
		}
		if foreign != "" {
			foreign = "." + strings.Repeat(foreign, 8)
		}
		return strings.Repeat(name, 16) + "~" + tail + foreign
	}
	entries := func(names string) (list []entry) {
		for name := range strings.FieldsSeq(names) {
			line := "line " + name
			if name == "G" {
				line = gapLine
			}
			list = append(list, entry{id(name), line})
		}
		return list
	}
	for _, test := range []struct {
		story, mine, list, want string
		forgot                  bool
	}{
		{"a process that starts takes the list", "", "a b c", "a b c", false},
		{"nothing and nothing", "", "", "", false},
		{"what was missed comes behind", "a b", "a b c", "a b c", false},
		{"what came in between too, where the list has it", "a c", "a b c", "a b c", false},
		{"the order is the list's", "a b c", "b a c", "b a c", false},
		{"Redis forgot all", "a b c", "", "a b c", true},
		{"Redis forgot all, and another process said something since", "a b", "c", "a b c", true},
		{"Redis came back with a snapshot", "a b c", "a b", "a b c", true},
		{"and another process said something since", "a b c", "a d", "a b c d", true},
		{"what only this process has goes where it stood", "a x b y", "a b c", "a x b y c", true},
		{"a full list has pushed the rest out", "a b", "b c d e", "b c d e", false},
		{"away for more than a full list: nothing is kept", "a b", "c d e f", "c d e f", false},
		{"but what stands behind something of a full list was forgotten", "a c x", "b c d e", "b c x d e", true},
		{"what stands before the history is known to be old", "a b c d", "a b c d e", "b c d e", false},
		{"and what followed it was pushed out", "a x b", "a b c d e", "b c d e", false},
		{"a second copy in the list is none", "a b", "a b a2 c", "a b c", false},
		{"also if the first stands before the history", "", "a b c a2 d", "b c d", false},
		{"of two ids of a message the list's counts", "a b", "a2 b", "a2 b", false},
		{"a gap is an entry", "a G b", "a G b c", "a G b c", false},
		{"and is forgotten like one", "a G b", "a b", "a G b", true},
		{"a foreign line is no reason to write", "a a.f b", "a b", "a a.f b", false},
		{"nor is it pushed in front of a full list", "z.f a", "a b c d", "a b c d", false},
		{"it goes with the message that it followed", "a a.f b", "b a", "b a a.f", false},
		{"also when Redis forgot that", "a a.f b", "b", "a a.f b", true},
		{"a reader at a foreign line behind the first attempt, whose second one stands behind a gap, must not be carried over the gap: the line goes with its message",
			"a b b.f", "a G c b2", "a G c b2", false},
	} {
		log, forgot := reconcile(entries(test.mine), entries(test.list), 4)
		want := entries(test.want)
		expect(t, slices.Equal(log, want) && forgot == test.forgot,
			"%s: mine %q and the list %q give\n%v, %v, want\n%v, %v", test.story, test.mine, test.list, log, forgot, want, test.forgot)
	}
}

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
// CHAT_MODEL sets how many runs (.ci/run makes 5000 of them, without -race), CHAT_SEED the first one;
// alone it repeats that one. They are the same each time; give a seed to look for what they do not show.
func TestModel(t *testing.T) {
	t.Parallel()
	first, runs := uint64(1), 300
	if testing.Short() {
		runs = 100
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
	emptied  int // how many there were when it last forgot everything

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
		at: map[string]int{}, accepted: map[string]bool{}, dead: map[string]bool{}, emptied: -1}
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
	switch n := m.IntN(12); {
	case n < 3:
		p.cut()
	case n < 5:
		p.die()
	case n < 7:
		p.frozen = m.clock + m.IntN(600)
	case n == 7: // a restart
		m.cutAll()
	case m.keeps:
	case n == 8:
		m.snapshot, m.saved = slices.Clone(m.list), m.items
	case n == 9: // FLUSHALL
		m.list, m.emptied = nil, m.writes
		m.version++
	case n == 10: // a restart with nothing
		m.cutAll()
		m.list, m.emptied = nil, m.writes
		m.version++
	case m.items-m.saved >= m.size/2 || m.emptied == m.writes: // it would have nothing of what is held
	case n == 11: // a restart from the snapshot
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

// held returns the keys that are in the list, in a log, or on the way to one.
func (m *model) held() map[string]bool {
	held := map[string]bool{}
	for _, item := range m.list {
		id, _, _ := strings.Cut(item, " ")
		held[keyOf(id)] = true
	}
	for _, p := range m.processes {
		kept := p.follows && p.f.seam == "" // what comes before the seam is let go
		for _, msg := range p.queue {
			kept = kept || p.follows && msg[1] == p.f.seam
			if kept && msg[0] == "chat:id" {
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
	} else if !m.keeps && !slices.ContainsFunc(m.list, func(item string) bool { return strings.HasPrefix(item, key+"~") }) {
		m.dead[key] = true // its first copy was forgotten, and stands elsewhere in the logs that have it
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
	trips      int // round trips since the last line
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

// cut ends the connections. What was sent may still be run; what the subscription had not read yet
// is dead if nobody else has it.
func (p *modelProcess) cut() {
	unread := p.queue
	p.stay++
	p.subscribed, p.queue, p.f, p.follows, p.items = false, nil, nil, false, nil
	if p.room != nil {
		p.room.broker.setAway(errForgot)
	}
	p.pending = slices.DeleteFunc(p.pending, func(modelCommand) bool { return p.IntN(2) == 0 })
	if p.keeps || len(unread) == 0 {
		return
	}
	held := p.held()
	for _, msg := range unread {
		if key := keyOf(msg[1]); msg[0] == "chat:id" && !held[key] {
			p.dead[key] = true
		}
	}
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
			p.room = &room{log: l, broker: newBroker(cfg, l, func(string, ...any) {}, nil)}
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
	p.f = newFeed(p.room.log, "chat")
	p.room.broker.depart()
	list, raw := p.parsed(), len(p.list)
	p.publish("chat:probe", p.f.probe)
	log, anew := p.f.merge(list)
	if anew == nil {
		p.f.begin(log, p.f.probe, raw, len(list) >= p.size)
		p.follows, p.underWay = true, true
		return
	}
	p.log, p.items = p.f.merge(p.parsed()) // under WATCH
	p.watched = p.version
	if p.keeps {
		p.fail("the list is written though Redis forgot nothing")
	}
}

func (p *modelProcess) writeList(faults bool) {
	p.room.broker.depart()
	p.list = nil
	for _, e := range p.items {
		p.list = append(p.list, e.id+" "+e.line)
		if _, again := p.at[keyOf(e.id)]; !again {
			p.at[keyOf(e.id)] = p.clock
		}
	}
	p.version++
	p.writes++
	p.model.items++ // the gap
	p.publish("chat:probe", rewritten+p.f.probe)
	if faults && p.IntN(10) == 0 { // the answer is lost
		p.cut()
		return
	}
	p.f.begin(p.log, rewritten+p.f.probe, len(p.items), false)
	p.follows, p.underWay, p.items = true, true, nil
}

// follow reads some of what came, and begins a round trip often enough for the ring: a Redis that
// forgot while a process lags shows only until the list is full again.
func (p *modelProcess) follow() {
	b := p.room.broker
	asked := false
	if !p.underWay {
		select {
		case <-b.asking:
			asked = true
		default:
		}
	}
	if !p.underWay && (asked || p.IntN(2+p.size/4) == 0) {
		least := p.f.least()
		b.depart()
		p.trim()
		length := int64(len(p.list))
		p.publish("chat:probe", p.f.probe)
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
		if msg[0] != "chat:probe" {
			p.trips = 0
		}
		if err := p.f.hear(msg[0], msg[1]); err != nil {
			p.cut()
			return
		}
		if len(p.f.echo) > 0 {
			<-p.f.echo
			p.underWay = false
			p.trips++
			b.arrive()
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
	if c.stay == p.stay && (length <= c.least || faults && p.IntN(50) == 0) {
		p.cut()
	}
}

// tooLate tells whether a second copy would come so far behind the first that it would be shown, or
// dropped by those who start later: the list is told, not kept, to have no such. (Who writes back may
// have put the first one in front.)
func (m *model) tooLate(key string) bool {
	first, again := m.listed[key]
	behind := m.items - first
	if i := slices.IndexFunc(m.list, func(item string) bool { return strings.HasPrefix(item, key+"~") }); i >= 0 {
		behind = len(m.list) - i
	}
	return again && behind > m.size/8
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
	if c.to = c.at.room; c.to == nil || c.to.broker.away() != nil {
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
			r.after = cmp.Or(r.cur.after, r.after)
			return
		}
	}
}

// poll is one answer to ?wait=0, by the real stream, once the place is known.
func (r *modelReader) poll() {
	ahead := r.cur
	n := r.to.next(&ahead)
	if n.unknown {
		r.cur.settled = ahead.settled
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
		r.after = cmp.Or(id, r.after)
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
	r.gaps++
	r.gapAt, r.fresh, r.since = r.clock, true, nil
}

func (r *modelReader) message(id string) {
	key := keyOf(id)
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
		if !r.seen[key] && !r.dead[key] && r.model.at[key] >= r.begun && r.gapAt < r.model.at[key] {
			r.fail("reader %d (polls %v) was not told %s, of step %d, nor a gap since; the last was at %d", i, r.polls, key, r.model.at[key], r.gapAt)
		}
	}
}

// over tells whether nothing is left to do.
func (m *model) over() bool { return m.unrest() == "" }

func (m *model) unrest() string {
	for i, p := range m.processes {
		if p.room == nil || p.room.broker.away() != nil || len(p.pending) > 0 || len(p.queue) > 0 || p.trips < 2 {
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
		if r.to == nil || !live || r.after != cmp.Or(r.to.log.newestID(), r.after) {
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
		if !slices.Equal(got[len(got)-n:], want[len(want)-n:]) || n < min(m.size/2, len(want)) || len(got) != len(want) && len(m.list) < m.size && len(p.room.log.entries()) < m.size {
			m.fail("process %d holds %q, and the list %q", i, got, want)
		}
	}
}

// ---- mixed ----

// TestMixedFaults has three processes of a full room on one Redis, six writers that send each message
// until it is accepted, and thirty readers that go from process to process with the last id they got,
// while Redis and the processes are killed, stopped, cut off and slowed. As long as Redis keeps its
// data every reader gets every accepted message once, in one order, and no gap. When it forgets, who
// misses one is told a gap behind the place where it is missing; after a gap everything may come again.
//
// CHAT_MIXED sets how long, such as 10m; CHAT_SEED repeats the choices of an earlier run.
func TestMixedFaults(t *testing.T) {
	t.Parallel()
	length := 15 * time.Second
	if os.Getenv("CI") == "true" {
		length = time.Minute
	}
	if testing.Short() {
		length = 3 * time.Second
	}
	if text := os.Getenv("CHAT_MIXED"); text != "" {
		var err error
		length, err = time.ParseDuration(text)
		must(t, err)
	}
	seed := rand.Uint64()
	if text := os.Getenv("CHAT_SEED"); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	for _, test := range []struct {
		name  string
		keeps bool
		args  []string // of redis-server
	}{
		{"Redis keeps its data", true, []string{"--appendonly", "yes", "--appendfsync", "always"}},
		{"Redis forgets", false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			t.Logf("CHAT_SEED=%d", seed)
			m := newMix(t, seed, startRedis(t, test.args...), test.keeps)
			m.run(length)
			m.judge()
		})
	}
}

// A mix is a room of three processes under faults, with those who write and read in it.
type mix struct {
	t     *testing.T
	rand  *rand.Rand // of the faults; writers and readers have their own
	redis *redisServer
	line  *relay // between the first process and Redis
	keeps bool   // Redis comes back with its data

	writers []*mixWriter
	readers []*mixReader
	ctx     context.Context // ends the readers
	cancel  context.CancelFunc
	reading sync.WaitGroup
	over    atomic.Bool // the writers finish their message and stop

	mu       sync.Mutex
	rooms    []*program // the processes
	ever     []*program // and those that they have replaced
	accepted []mixPost

	refused, unanswered, others, reconnects, faults atomic.Int64
}

// A mixPost is a message that was answered with 204.
type mixPost struct {
	key         string
	begun, done time.Time // the first attempt, and the answer
}

func newMix(t *testing.T, seed uint64, r *redisServer, keeps bool) *mix {
	m := &mix{t: t, rand: rand.New(rand.NewPCG(seed, 0)), redis: r, keeps: keeps, line: newRelay(t, r.addr)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	t.Cleanup(func() {
		m.cancel()
		m.reading.Wait()
	})
	// The list is full, so that from the first message on the oldest ones are forgotten.
	r.fill(listSize(ringSize), "")
	m.rooms = make([]*program, 3)
	for i := range m.rooms {
		m.startRoom(i)
		m.rooms[i].joined()
	}
	for i := range 6 {
		m.writers = append(m.writers, &mixWriter{m, i, rand.New(rand.NewPCG(seed, uint64(100+i))),
			newClient(t, m.rooms[0].url).login(fmt.Sprintf("writer %d", i))})
	}
	for i := range 30 {
		m.readers = append(m.readers, &mixReader{mix: m, rand: rand.New(rand.NewPCG(seed, uint64(200+i))),
			query: []string{"", "", "?wait=2s", "?wait=0"}[i%4], fresh: map[string]bool{}, first: map[string]int{}, gap: -1})
	}
	return m
}

func (m *mix) startRoom(i int) {
	addr := m.redis.addr
	if i == 0 {
		addr = m.line.addr
	}
	p := startProcess(m.t, "-redis", addr, "-history", "4096")
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rooms[i] = p
	m.ever = append(m.ever, p)
}

// anyURL is the address of a process, which may be gone.
func (m *mix) anyURL(r *rand.Rand) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rooms[r.IntN(len(m.rooms))].url
}

// run lets everybody write and read, and Redis and the processes suffer, for that long; then
// everything is whole again, the writers finish, and a last message ends it.
func (m *mix) run(length time.Duration) {
	var writing sync.WaitGroup
	for _, r := range m.readers {
		m.reading.Go(r.run)
	}
	for _, w := range m.writers {
		writing.Go(w.run)
	}
	for start := time.Now(); time.Since(start) < length; {
		m.pause(200*time.Millisecond, 1500*time.Millisecond)
		if !m.keeps {
			m.whole() // what Redis forgets, two processes must hold, since one may be killed with it
		}
		m.disturb()
	}
	m.over.Store(true)
	writing.Wait()
	for i, p := range m.rooms { // each notices now, if it has not, that Redis forgot
		m.whole()
		m.writers[i].client.at(p.url).insist(fmt.Sprint("at-the-end-", i))
	}
	m.whole()
	m.writers[0].client.at(m.rooms[0].url).insist("the-very-last")
	within(m.t, 4*patience, "every reader to get the last message", func() bool {
		return !slices.ContainsFunc(m.readers, func(r *mixReader) bool { return !r.finished() })
	})
}

// whole waits until every process is joined.
func (m *mix) whole() {
	for _, p := range m.rooms {
		p.joined()
	}
}

func (m *mix) pause(low, high time.Duration) {
	time.Sleep(low + time.Duration(m.rand.Int64N(int64(high-low))))
}

// disturb does something to Redis, or to a process, or to both at a time.
func (m *mix) disturb() {
	var ends []func()
	what := m.rand.IntN(4)
	if what == 3 && !m.keeps { // Redis and one who holds what it has, together
		i := m.rand.IntN(len(m.rooms))
		m.rooms[i].Process.Kill()
		ends = append(ends, m.killRedis(), func() { m.startRoom(i) })
		m.rooms[i].wait(patience)
	}
	if what == 1 || what == 2 {
		ends = append(ends, m.disturbRedis())
	}
	if what == 0 || what == 2 {
		m.pause(0, 500*time.Millisecond)
		ends = append(ends, m.disturbRoom(m.rand.IntN(len(m.rooms))))
	}
	m.rand.Shuffle(len(ends), func(i, j int) { ends[i], ends[j] = ends[j], ends[i] })
	for _, end := range ends {
		m.pause(0, 2500*time.Millisecond)
		end()
	}
	m.faults.Add(int64(len(ends)))
}

// killRedis returns how to start it again. If it forgets, it does so with nothing, or with what it
// had a while ago.
func (m *mix) killRedis() (end func()) {
	dump := filepath.Join(m.redis.dir, "dump.rdb")
	if m.keeps || m.rand.IntN(2) == 0 {
		m.redis.kill()
		os.Remove(dump)
		return m.redis.start
	}
	m.redis.do("SAVE")
	m.pause(0, 2*time.Second)
	m.redis.kill()
	return m.redis.start
}

func (m *mix) disturbRedis() (end func()) {
	switch n := m.rand.IntN(7); {
	case n < 3:
		return m.killRedis()
	case n == 3:
		m.redis.signal("STOP")
		return func() { m.redis.signal("CONT") }
	case n == 4 && !m.keeps:
		m.redis.do("FLUSHALL")
	case n == 5:
		m.redis.do("CLIENT", "KILL", "TYPE", "normal")
	default:
		m.redis.do("CLIENT", "KILL", "TYPE", "pubsub")
	}
	return func() {}
}

func (m *mix) disturbRoom(i int) (end func()) {
	switch n := m.rand.IntN(7); {
	case n < 2:
		m.rooms[i].kill()
		return func() { m.startRoom(i) }
	case n == 2:
		m.rooms[i].stop()
		return func() { m.startRoom(i) }
	case n < 5:
		m.line.holdAnswers()
		return func() {
			m.pause(0, 4*time.Second)
			m.line.release()
		}
	default:
		m.rooms[i].signal("STOP")
		return func() {
			if n == 6 {
				time.Sleep(6 * time.Second)
			}
			m.rooms[i].signal("CONT")
		}
	}
}

// A mixWriter sends each of its messages until it is accepted.
type mixWriter struct {
	*mix
	number int
	rand   *rand.Rand
	client *client
}

func (w *mixWriter) run() {
	for n := 0; !w.over.Load(); n++ {
		key, begun := nameKey(fmt.Sprintf("%d-%06d", w.number, n)), time.Now()
		for !w.send(key) {
			if time.Since(begun) > time.Minute {
				w.t.Errorf("%s is not accepted for a minute", key)
				return
			}
			time.Sleep(50*time.Millisecond + w.pause())
		}
		w.mu.Lock()
		w.accepted = append(w.accepted, mixPost{key, begun, time.Now()})
		w.mu.Unlock()
		time.Sleep(20*time.Millisecond + w.pause()/4)
	}
}

func (w *mixWriter) pause() time.Duration { return time.Duration(w.rand.IntN(150)) * time.Millisecond }

func (w *mixWriter) send(key string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	c := w.client.at(w.anyURL(w.rand))
	resp, err := c.send(ctx, "POST", "/post", form("message", key), "Idempotency-Key: "+key)
	if err != nil {
		w.unanswered.Add(1)
		return false
	}
	resp.Body.Close()
	switch resp.StatusCode {
	case 204:
		return true
	case 503:
		w.refused.Add(1)
	default:
		expect(w.t, w.others.Add(1) > 5, "%s at %s: got %d, want 204 or 503", key, c.url, resp.StatusCode)
	}
	return false
}

// A mixReader reads at one process for a while, then goes on at another.
type mixReader struct {
	*mix
	rand  *rand.Rand
	query string // how it reads

	mu      sync.Mutex
	last    string          // id to go on after
	order   []string        // the keys of what it got since the last gap
	fresh   map[string]bool // the same
	doubled []string        // what it got twice between two gaps
	gaps    int

	// Where things stand in what it was told: the events are numbered, and what comes again after a
	// gap, up to the next ping, stands where the gap does.
	events int
	again  bool           // since the last gap came no ping
	gap    int            // number of the last gap
	first  map[string]int // key → number of the event that first brought it
}

func (r *mixReader) run() {
	for r.ctx.Err() == nil {
		r.visit(r.anyURL(r.rand))
	}
}

// visit reads at one process until that ends, or for at most three seconds.
func (r *mixReader) visit(url string) {
	stay := time.Duration(50+r.rand.IntN(3000)) * time.Millisecond
	ctx, cancel := context.WithTimeout(r.ctx, stay)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", url+"/stream"+r.query, nil)
	if r.last != "" {
		req.Header.Set("Last-Event-ID", r.last)
	}
	resp, err := http.DefaultClient.Do(req)
	if err == nil {
		defer resp.Body.Close()
	}
	if err != nil || resp.StatusCode != 200 || r.query != "" {
		time.Sleep(time.Duration(50+r.rand.IntN(200)) * time.Millisecond)
	}
	if err != nil || resp.StatusCode != 200 {
		return
	}
	r.reconnects.Add(1)
	for e := range events(resp.Body) {
		r.got(e)
	}
}

func (r *mixReader) got(e event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = cmp.Or(e.id, r.last)
	r.events++
	switch key := keyOf(e.id); e.kind {
	case "ping":
		r.again = false
	case "gap":
		r.gaps++
		r.gap, r.again = r.events, true
		r.order, r.fresh = nil, map[string]bool{}
	case "message":
		if !strings.HasPrefix(key, nameKey("")) {
			return // was there before
		}
		if r.fresh[key] {
			r.doubled = append(r.doubled, key)
		}
		r.order, r.fresh[key] = append(r.order, key), true
		if _, known := r.first[key]; !known && r.again {
			r.first[key] = r.gap - 1
		} else if !known {
			r.first[key] = r.events
		}
	}
}

func (r *mixReader) finished() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fresh[nameKey("the-very-last")]
}

// missed returns which of the accepted messages the reader did not get, and of which of these it was
// not told: it had no gap behind everything that was accepted before they were sent.
func (r *mixReader) missed(accepted []mixPost) (missing int, untold []string) {
	for _, p := range accepted {
		if _, got := r.first[p.key]; got {
			continue
		}
		missing++
		for _, before := range accepted {
			if at, got := r.first[before.key]; got && before.done.Before(p.begun) && at > r.gap {
				untold = append(untold, p.key)
				break
			}
		}
	}
	return missing, untold
}

// judge says what the readers have not, or twice, or in another order than the processes in the end.
func (m *mix) judge() {
	m.cancel()
	m.reading.Wait()
	var log []string
	for i, p := range m.rooms {
		var got []string
		for _, e := range m.writers[0].client.at(p.url).poll("") {
			if key := keyOf(e.id); e.kind == "message" && strings.HasPrefix(key, nameKey("")) {
				got = append(got, key)
			}
		}
		expect(m.t, i == 0 || slices.Equal(got, log), "in the end process %d has other messages than process 0: %d and %d", i, len(got), len(log))
		log = got
	}
	missing, untold, doubled, gaps := 0, 0, 0, 0
	for i, r := range m.readers {
		missed, secret := r.missed(m.accepted)
		missing, untold, doubled, gaps = missing+missed, untold+len(secret), doubled+len(r.doubled), gaps+r.gaps
		expect(m.t, len(secret)+len(r.doubled) <= 0,
			"reader %d (%q) did not get, and was not told of %q, and got twice %q", i, r.query, secret, r.doubled)
		n := min(len(log), len(r.order))
		expect(m.t, slices.Equal(r.order[len(r.order)-n:], log[len(log)-n:]), "reader %d (%q) got another order than the processes have", i, r.query)
	}
	wrote := 0
	for _, p := range m.ever {
		wrote += strings.Count(p.log.String(), "redis had forgotten")
	}
	expect(m.t, !m.keeps || missing == 0 && gaps == 0 && wrote == 0,
		"%d messages are missing, %d gaps were told, and the list was written %d times, although Redis kept everything", missing, gaps, wrote)
	m.t.Logf("| %d faults | %d accepted | %d lost | %d of them not told | %d doubled | %d gaps over %d readers, of %d writes | %d connections | 503: %d, no answer: %d, other: %d |",
		m.faults.Load(), len(m.accepted), missing, untold, doubled, gaps, len(m.readers), wrote, m.reconnects.Load(), m.refused.Load(), m.unanswered.Load(), m.others.Load())
}

// ---- readers ----

// quietReader asks for events on a connection with little room and reads nothing by itself.
func quietReader(t testing.TB, url, request string) net.Conn {
	t.Helper()
	conn := dial(t, url)
	conn.(*net.TCPConn).SetReadBuffer(64 << 10)
	conn.SetReadDeadline(time.Now().Add(2 * patience))
	io.WriteString(conn, request)
	return conn
}

// answerOn reads the head of an answer and yields its events, taking little at a time.
func answerOn(t testing.TB, from io.Reader) iter.Seq[event] {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReaderSize(from, 1<<10), nil)
	require(t, err == nil, "reading the head of a stream: %v", err)
	return events(resp.Body)
}

// descriptors counts the open files of a room in a process of its own.
func (p *program) descriptors() int {
	p.t.Helper()
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(p.Pid), "fd"))
	if err != nil {
		p.t.Skipf("cannot look into a process here: %v", err)
	}
	return len(files)
}

var residentPages = regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB`)

// resident is the memory of a room in a process of its own, in KB.
func (p *program) resident() int {
	p.t.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.Pid), "status"))
	found := residentPages.FindSubmatch(status)
	if found == nil {
		p.t.Skipf("cannot look into a process here: %v", err)
	}
	kb, _ := strconv.Atoi(string(found[1]))
	return kb
}

// unsent is the most that the kernel keeps for one reader of the room, in bytes.
func (p *program) unsent() (most int) {
	p.t.Helper()
	for _, s := range sockets(p.t, p.url) {
		most = max(most, s.unsent)
	}
	return most
}

// A socket is what the kernel keeps for the server's side of a connection, in bytes.
type socket struct{ unsent, unread int }

// sockets returns those of the server at an address of this machine.
func sockets(t testing.TB, addr string) (all []socket) {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Skipf("cannot look into sockets here: %v", err)
	}
	const listens = "0A"
	port, _ := strconv.Atoi(addr[strings.LastIndex(addr, ":")+1:])
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) && fields[3] != listens {
			var s socket
			fmt.Sscanf(fields[4], "%X:%X", &s.unsent, &s.unread)
			all = append(all, s)
		}
	}
	return all
}

// goroutines ends the room's process and counts what ran in it for us or for net/http.
func (p *program) goroutines() int {
	p.t.Helper()
	p.signal("QUIT") // Go prints every goroutine's stack
	p.wait(patience)
	n := 0
	for _, stack := range strings.Split(p.log.String(), "\ngoroutine ")[1:] {
		if strings.Contains(stack, "main.") || strings.Contains(stack, "net/http.") {
			n++
		}
	}
	return n
}

// kilobyte makes a message, of a number, about a kilobyte long.
var kilobyte = " " + strings.Repeat("x", 1000)

// number is the one that a message of a kilobyte begins with, -1 if it is no message.
func (e event) number() int {
	if e.kind != "message" {
		return -1
	}
	number, _, _ := strings.Cut(e.text(), " ")
	n, _ := strconv.Atoi(number)
	return n
}

// TestReadersThatNeverRead has 300 of them while a megabyte goes by. They must cost what was promised,
// hold nobody up, and be gone in the end.
func TestReadersThatNeverRead(t *testing.T) {
	t.Parallel()
	readers, messages := 300, 1000
	if testing.Short() {
		readers, messages = 100, 300
	}
	for name, request := range map[string]func(i int) string{
		"streams": func(int) string { return rawGet("/stream") },
		"WebSockets, of which half want to be answered": func(i int) string {
			return shake("/ws") + strings.Repeat(masked(0x89, strings.Repeat("p", 125)), 50*(i%2))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t)
			c := newClient(t, p.url)
			c.sayMany(ringSize, kilobyte)
			files, before := p.descriptors(), p.resident()
			for i := range readers {
				quietReader(t, p.url, request(i))
			}
			live := c.stream("", "")
			live.until("ping")
			slowest := time.Duration(0)
			for i := range messages {
				start := time.Now()
				c.say(fmt.Sprint(i, kilobyte))
				got := live.message().number()
				require(t, got == i, "somebody else heard %d, want %d", got, i)
				slowest = max(slowest, time.Since(start))
			}
			expect(t, slowest <= 10*time.Second, "somebody else's message took %v", slowest)
			kept := p.unsent()
			expect(t, kept <= 64<<10+blockSize && kept >= 4<<10,
				"the kernel keeps %d bytes for one of them, want some and at most 64 KB and the last write", kept)
			cost := (p.resident() - before) / readers
			expect(t, cost <= 64, "each of them costs %d KB, want at most 64", cost)
			t.Logf("each costs %d KB, and at most %d bytes in the kernel; the slowest message took %v", cost, kept, slowest)
			if !testing.Short() {
				live.close()
				within(t, 2*patience, "those who do not read to be cut off", func() bool { return p.descriptors() < files+10 })
			}
		})
	}
}

// TestSlowReader reads 50 KB/s. It gets everything, in order.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	messages := 700
	if testing.Short() {
		messages = 150
	}
	c := newClient(t, startRoom(t).url)
	conn := quietReader(t, c.url, rawGet("/stream"))
	slow, feed := io.Pipe()
	defer slow.Close()
	go func() {
		for {
			time.Sleep(100 * time.Millisecond)
			if _, err := io.CopyN(feed, conn, 5<<10); err != nil {
				feed.CloseWithError(err)
				return
			}
		}
	}()
	together(2, func(who int) { // at once, or on a slow machine it would read nothing for too long
		if who == 0 {
			for i := range messages {
				c.say(fmt.Sprint(i, kilobyte))
			}
			return
		}
		i := 0
		for e := range answerOn(t, slow) {
			if e.kind == "ping" {
				continue
			}
			require(t, e.number() == i, "message %d is %s %.30q", i, e.kind, e.data)
			if i++; i == messages {
				return
			}
		}
	})
}

// TestReaderBehindTheRing stops reading for more messages than anybody remembers.
func TestReaderBehindTheRing(t *testing.T) {
	const messages, early = 4500, 10
	synctest.Test(t, func(t *testing.T) {
		l := newTestLog(t, 200, numbered(0, early))
		defer l.close()
		here, there := net.Pipe()
		defer here.Close()
		go (&stream{room: inMemory(l), conn: there, at: from("0")}).run()
		synctest.Wait() // it writes, and nobody reads
		for _, m := range numbered(early, messages-early) {
			l.append(m)
		}
		want := lines(slices.Concat(numbered(0, early), []entry{{"", "(gap)"}}, numbered(messages-200, 200)))
		var got []event
		for e := range events(here) {
			if got = append(got, e); e.data == want[len(want)-1] {
				break
			}
		}
		same(t, heard(got), want, "it is told")
	})
}

// TestRelayThatStops has a proxy that stops copying and tells nobody.
func TestRelayThatStops(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url)
	line := newRelay(t, strings.TrimPrefix(c.url, "http://"))
	s := c.at("http://"+line.addr).stream("", "")
	c.say("one")
	last := s.message().id
	line.hold()
	c.say("two", "three")
	c.stream("", last).hears("anonymous: two", "anonymous: three")
	line.release()
	s.hears("anonymous: two", "anonymous: three")
}

// TestRelayThatHoldsBack has a proxy that passes an answer on when it is whole. A stream does
// not get through; polling does.
func TestRelayThatHoldsBack(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url)
	line := newRelay(t, strings.TrimPrefix(c.url, "http://"))
	line.holdBack()
	behind := newClient(t, "http://"+line.addr)
	c.say("one")
	got := behind.poll("")
	same(t, heard(got), []string{"one"}, "polling gives")
	answered := make(chan []event)
	start := time.Now()
	go func() { answered <- behind.stream("wait=50s", got[len(got)-2].id).until("end") }()
	line.comes(1)
	c.say("two")
	same(t, heard(<-answered), []string{"two"}, "long polling gives")
	expect(t, time.Since(start) <= 25*time.Second, "it takes %v, want the message at once", time.Since(start))
}

// TestComingAndGoing has many readers come and go in every way there is. What they took comes
// back.
func TestComingAndGoing(t *testing.T) {
	t.Parallel()
	readers, rounds := 2500, 2
	if testing.Short() {
		readers = 100
	}
	sends := func(text string) func(*net.TCPConn) {
		return func(conn *net.TCPConn) { io.WriteString(conn, text) }
	}
	reset := func(text string) func(*net.TCPConn) {
		return func(conn *net.TCPConn) { io.WriteString(conn, text); conn.SetLinger(0) }
	}
	half := func(conn *net.TCPConn) { conn.CloseWrite() }
	for _, test := range []struct {
		name, request string
		ways          []func(*net.TCPConn)
	}{
		{"streams", rawGet("/stream"), []func(*net.TCPConn){
			sends(""),                       // FIN, after an answer
			reset(""),                       // RST
			sends("x"),                      // a byte that nobody asked for
			sends("GET / HTTP/1.1\r\n\r\n"), // a second request
			reset("x"), half}},
		{"WebSockets", shake("/ws"), []func(*net.TCPConn){
			sends(""), reset(""), half,
			sends(masked(0x88, "\x03\xe8")),          // as it should
			sends(announce(0x81, 65536, "abcd", "")), // in the middle of a frame
			reset("\xff\xff"),                        // breaking the rules
			sends(masked(0x01, "data: x")),           // in the middle of a message
			reset("x"),
			sends(say("x") + "\x89")}}, // with a post
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t)
			c := newClient(t, p.url)
			c.say("hello")
			files := p.descriptors()
			var memory []int
			for range rounds {
				together(50, func(i int) {
					for n := i; n < readers; n += 50 {
						conn := quietReader(t, p.url, test.request).(*net.TCPConn)
						if n%3 > 0 { // else gone before the answer
							conn.Read(make([]byte, 2000))
						}
						test.ways[n%len(test.ways)](conn)
						conn.Close()
					}
				})
				eventually(t, "the descriptors to come back", func() bool {
					if testing.Short() {
						c.say("hello") // shows who is gone sooner than the next ping
					}
					return p.descriptors() <= files+2
				})
				memory = append(memory, p.resident())
			}
			expect(t, memory[1] <= memory[0]+10<<10, "after %d readers, and twice as many, it holds %d KB", readers, memory)
			left := p.goroutines()
			expect(t, left <= 5, "%d goroutines are left, want about 3", left)
		})
	}
}

// Who is one connection too many is told, and let go.
func TestOneConnectionTooMany(t *testing.T) {
	s := newTestServer(t, &config{}, t.Logf)
	s.maxConns = 0
	here, _ := net.Pipe()
	defer here.Close()
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequestWithContext(s.opened(t.Context(), here), "GET", "/healthz", nil))
	h := w.Header()
	expect(t, w.Code == 503 && h.Get("Retry-After") != "" && h.Get("Connection") == "close",
		"got %d with %v, want 503, when to come back, and an end of the connection", w.Code, h)
}

// TestFewDescriptors fills a process that may open 120 files, with streams or with connections that ask
// for nothing. It must say so, keep some for Redis, and be of use again when the crowd has left.
func TestFewDescriptors(t *testing.T) {
	t.Parallel()
	idle := startLimited(t, "ulimit -n 120")
	eventually(t, "the log to say that it is full", func() bool {
		dial(t, idle.url)
		return strings.Contains(idle.log.String(), " full: ")
	})
	r := startRedis(t)
	p := startLimited(t, "ulimit -n 120", "-redis", r.addr).joined()
	c := newClient(t, p.url)
	var crowd []net.Conn
	streams, refused := 0, 0
	for range 100 {
		conn := quietReader(t, p.url, rawGet("/stream"))
		crowd = append(crowd, conn)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		switch {
		case err != nil: // beyond what can even be answered
		case resp.StatusCode == 200:
			streams++
		case resp.StatusCode == 503 && resp.Header.Get("Retry-After") != "":
			refused++
		default:
			t.Errorf("a stream: got %d with Retry-After %q, want 200, or 503 with one", resp.StatusCode, resp.Header.Get("Retry-After"))
		}
	}
	expect(t, streams >= 50 && refused >= 10, "%d streams were opened and %d refused, want 50 and 10 at least", streams, refused)
	c.say("the room goes on")
	for range 100 { // connections that ask for nothing
		if conn, err := net.DialTimeout("tcp", strings.TrimPrefix(p.url, "http://"), patience); err == nil {
			crowd = append(crowd, conn)
			defer conn.Close()
		}
	}
	got := rawRequest(t, p.url, raw("GET /healthz HTTP/1.1", "Host: test", "Connection: close"))
	expect(t, got.status == 503 || got.status == 0, "one more connection than there may be: got %d, want 503 or nothing", got.status)
	same(t, strings.Count(p.log.String(), " full: "), 1, "the log says")
	r.cut()
	eventually(t, "Redis to be dialled again", func() bool { return slices.Equal(p.changes(), []string{"joined", "away", "joined"}) })
	for _, conn := range crowd {
		conn.Close()
	}
	n := 0
	eventually(t, "a newcomer to be let in", func() bool {
		n++
		c.attempt(fmt.Sprint("hello-again-", n)) // shows the room who is gone
		return c.get("/stream?wait=0").status == 200
	})
	same(t, c.newcomer()[0], "the room goes on", "a newcomer gets first")
	p.changed("joined", "away", "joined")
}

// ---- pages: a relay that can fail ----

// A pageRelay stands between browser and server, and does to the traffic what networks do.
type pageRelay struct {
	t      *testing.T
	target string
	addr   string
	server *http.Server

	mu      sync.Mutex
	status  map[string]int // path: answered with this status, the server sees nothing
	swallow bool           // POST /post reaches the server, its answer is lost
	hold    bool           // answers are held back until they end
	delay   time.Duration  // before a POST is passed on
	instead string         // what a stream gets instead of the server's answer
	keys    []string       // Idempotency-Key of every POST /post that came
	streams map[chan string]bool
	sockets map[net.Conn]bool
	opened  []string // what was asked of /stream
	posted  *http.Request
}

func startPageRelay(t *testing.T, target string) *pageRelay {
	p := &pageRelay{t: t, target: target, addr: "127.0.0.1:0", status: map[string]int{}, streams: map[chan string]bool{}, sockets: map[net.Conn]bool{}}
	p.start()
	t.Cleanup(p.stop)
	return p
}

// url is the address as a browser on the LAN sees it: not localhost, so not a secure context.
func (p *pageRelay) url() string {
	return "http://chat.test:" + p.addr[strings.LastIndex(p.addr, ":")+1:]
}

func (p *pageRelay) start() {
	l, err := net.Listen("tcp", p.addr)
	must(p.t, err)
	p.addr = l.Addr().String()
	p.server = &http.Server{Handler: p}
	go p.server.Serve(l)
}

// stop ends every connection at once, as a killed server does.
func (p *pageRelay) stop() {
	p.server.Close()
	p.set(func() {
		for c := range p.sockets {
			c.Close()
		}
	})
}

func (p *pageRelay) restart() { p.stop(); p.start() }

// set changes the relay's behaviour.
func (p *pageRelay) set(change func()) { p.mu.Lock(); defer p.mu.Unlock(); change() }

// posts counts the POSTs that came, and the different messages among them.
func (p *pageRelay) posts() (tries, messages int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	different := map[string]bool{}
	for _, k := range p.keys {
		different[k] = true
	}
	return len(p.keys), len(different)
}

// send writes frames into every open stream, as if the server had.
func (p *pageRelay) send(frames string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.streams {
		c <- frames
	}
}

// says has a message come, by the clock of "10:00:00", and waits until the browser shows it.
func (p *pageRelay) says(b *browser, who, text string) {
	b.t.Helper()
	p.send(frame(id(), "[10:00:00] "+who+": "+text))
	b.hasText(text)
}

// until waits for what is seen at the relay.
func (p *pageRelay) until(what string, isSo func() bool) {
	p.t.Helper()
	within(p.t, 10*time.Second, what, func() (so bool) { p.set(func() { so = isSo() }); return so })
}

// opens waits until more than n streams have been opened.
func (p *pageRelay) opens(n int, what string) {
	p.t.Helper()
	p.until(what, func() bool { return len(p.opened) > n })
}

func (p *pageRelay) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	status, swallow, hold, delay, instead := p.status[r.URL.Path], p.swallow, p.hold, p.delay, p.instead
	if r.URL.Path == "/post" {
		p.keys, p.posted = append(p.keys, r.Header.Get("Idempotency-Key")), r
	}
	if r.URL.Path == "/stream" && r.Method == "GET" {
		p.opened = append(p.opened, r.URL.RawQuery)
	}
	p.mu.Unlock()
	if status != 0 {
		w.Header().Set("Retry-After", "1")
		http.Error(w, "a fault of the relay", status)
		return
	}
	if r.URL.Path == "/stream" && instead != "" {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, instead)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return
	}
	if r.Method == "POST" {
		time.Sleep(delay)
	}
	out, _ := http.NewRequestWithContext(r.Context(), r.Method, p.target+r.URL.RequestURI(), r.Body)
	out.Header, out.Host, out.ContentLength = r.Header.Clone(), r.Host, r.ContentLength
	res, err := http.DefaultTransport.RoundTrip(out)
	if err != nil || swallow && r.URL.Path == "/post" {
		panic(http.ErrAbortHandler) // the connection breaks without an answer
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusSwitchingProtocols {
		p.passSocket(w, res)
		return
	}
	for k, v := range res.Header {
		w.Header()[k] = v
	}
	if r.URL.Path == "/stream" && r.Method == "GET" && !hold {
		w.WriteHeader(res.StatusCode)
		p.passStream(w, res.Body)
		return
	}
	body, _ := io.ReadAll(res.Body)
	w.WriteHeader(res.StatusCode)
	w.Write(body)
}

// passStream passes whole frames on, the server's and those of send.
func (p *pageRelay) passStream(w http.ResponseWriter, body io.Reader) {
	frames := make(chan string, 1000)
	p.set(func() { p.streams[frames] = true })
	defer p.set(func() { delete(p.streams, frames) })
	ended := make(chan bool)
	go func() {
		defer close(ended)
		s := bufio.NewScanner(body)
		var frame strings.Builder
		for s.Scan() {
			frame.WriteString(s.Text() + "\n")
			if s.Text() == "" {
				frames <- frame.String()
				frame.Reset()
			}
		}
	}()
	for {
		select {
		case f := <-frames:
			io.WriteString(w, f)
			w.(http.Flusher).Flush()
		case <-ended:
			for len(frames) > 0 {
				io.WriteString(w, <-frames)
			}
			return
		}
	}
}

// passSocket passes bytes on, both ways, until either side ends.
func (p *pageRelay) passSocket(w http.ResponseWriter, res *http.Response) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	p.set(func() { p.sockets[conn] = true })
	defer p.set(func() { delete(p.sockets, conn) })
	server := res.Body.(io.ReadWriteCloser)
	(&http.Response{StatusCode: res.StatusCode, ProtoMajor: 1, ProtoMinor: 1, Header: res.Header}).Write(conn)
	go func() { io.Copy(server, conn); server.Close() }()
	io.Copy(conn, server)
}

// frame encodes a message as the server does.
func frame(id, line string) string {
	return "id: " + id + "\ndata: " + strings.ReplaceAll(line, "\n", "\ndata: ") + "\n\n"
}

// ---- pages: a browser ----

type browser struct {
	t       *testing.T
	session string          // the session's address at chromedriver
	profile string          // Chromium's directory
	opened  map[string]bool // the origins of what was opened
}

var (
	chromedriver *exec.Cmd // ended by TestMain
	// driverURL is where chromedriver listens, started once per run of the tests.
	driverURL = sync.OnceValues(func() (string, error) {
		cmd := exec.Command("chromedriver", "--port=0")
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return "", err
		}
		chromedriver = cmd
		var said strings.Builder
		for lines := bufio.NewScanner(out); lines.Scan(); fmt.Fprintln(&said, lines.Text()) {
			if _, port, ok := strings.Cut(lines.Text(), "started successfully on port "); ok {
				go io.Copy(io.Discard, out)
				return "http://127.0.0.1:" + strings.TrimSuffix(port, "."), nil
			}
		}
		return "", fmt.Errorf("chromedriver named no port: %s", said.String())
	})
)

// idle has the browsers that no test has at the moment: a Chromium takes seconds to start.
var idle struct {
	sync.Mutex
	browsers []*browser
}

func endBrowsers() {
	for _, b := range idle.browsers {
		b.quit()
	}
	if chromedriver != nil {
		chromedriver.Process.Kill()
		chromedriver.Wait()
	}
}

// startBrowser is a Chromium with one empty tab, no cookie, and nothing of any test's pages. Its first
// tab prefers that language, if one is named.
func startBrowser(t *testing.T, language ...string) (b *browser) {
	t.Helper()
	if testing.Short() && t.Name() != "TestPageTwoPeople" {
		t.Skip("takes a browser; one look is enough")
	}
	need(t, "chromium", "apt-get install chromium")
	need(t, "chromedriver", "apt-get install chromium-driver")
	idle.Lock()
	if last := len(idle.browsers) - 1; last >= 0 {
		b, idle.browsers = idle.browsers[last], idle.browsers[:last]
	}
	idle.Unlock()
	if b == nil {
		b = newBrowser(t)
	}
	b.t = t
	t.Cleanup(func() {
		if t.Failed() || b.clear() != nil {
			b.quit()
			return
		}
		idle.Lock()
		defer idle.Unlock()
		idle.browsers = append(idle.browsers, b)
	})
	b.inject(short)
	if len(language) > 0 {
		b.cdp("Emulation.setUserAgentOverride", map[string]any{
			"userAgent": js[string](b, "return navigator.userAgent"), "acceptLanguage": language[0]})
	}
	return b
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	url, err := driverURL()
	must(t, err)
	profile, err := os.MkdirTemp("", "chat-browser-")
	must(t, err)
	b := &browser{t: t, session: url + "/session", profile: profile, opened: map[string]bool{}}
	path, _ := exec.LookPath("chromium")
	options := map[string]any{"binary": path, "args": []string{
		"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync",
		"--host-resolver-rules=MAP chat.test 127.0.0.1", "--user-data-dir=" + profile,
		"--window-size=1280,800"}}
	created := call[struct{ SessionID string }](b, "POST", "", map[string]any{"capabilities": map[string]any{
		"alwaysMatch": map[string]any{"goog:chromeOptions": options,
			"goog:loggingPrefs": map[string]string{"browser": "ALL", "performance": "ALL"}}}})
	b.session += "/" + created.SessionID
	return b
}

// clear gives the next test a tab of its own, without cookies, logs, and what the pages stored: a later
// room can get the port of an earlier one.
func (b *browser) clear() error {
	cdp := func(command string, params map[string]any) error {
		return try(b, "POST", "/goog/cdp/execute", map[string]any{"cmd": command, "params": params}, new(any))
	}
	var handles struct{ Value []string }
	var tab struct{ Value struct{ Handle string } }
	err := errors.Join(try(b, "GET", "/window/handles", nil, &handles), try(b, "POST", "/window/new", map[string]any{"type": "tab"}, &tab))
	for _, old := range handles.Value {
		err = errors.Join(err, try(b, "POST", "/window", map[string]any{"handle": old}, new(any)),
			try(b, "DELETE", "/window", nil, new(any)))
	}
	err = errors.Join(err, try(b, "POST", "/window", map[string]any{"handle": tab.Value.Handle}, new(any)),
		cdp("Network.clearBrowserCookies", map[string]any{}))
	for origin := range b.opened {
		err = errors.Join(err, cdp("Storage.clearDataForOrigin", map[string]any{"origin": origin, "storageTypes": "all"}))
	}
	b.opened = map[string]bool{}
	for _, kind := range []string{"browser", "performance"} {
		err = errors.Join(err, try(b, "POST", "/se/log", map[string]any{"type": kind}, new(any)))
	}
	return err
}

// quit ends the browser.
func (b *browser) quit() {
	try(b, "DELETE", "", nil, new(any))
	for range 50 { // its last process may still be writing
		if os.RemoveAll(b.profile) == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// inject has a script run in each document of this tab, before those of the page.
func (b *browser) inject(script string) {
	b.t.Helper()
	b.cdp("Page.addScriptToEvaluateOnNewDocument", map[string]any{"source": script})
}

// call sends one WebDriver command and decodes its value.
func call[T any](b *browser, method, path string, body any) T {
	b.t.Helper()
	var value struct{ Value T }
	err := try(b, method, path, body, &value)
	require(b.t, err == nil, "%s %s: %v", method, path, err)
	return value.Value
}

func try(b *browser, method, path string, body, answer any) error {
	if body == nil {
		body = map[string]any{}
	}
	sent, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(method, b.session+path, bytes.NewReader(sent))
	if err != nil {
		return err
	}
	client := http.Client{Timeout: 60 * time.Second}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != 200 {
		return fmt.Errorf("%.400s", got)
	}
	return json.Unmarshal(got, answer)
}

func (b *browser) open(address string) {
	b.t.Helper()
	u, err := url.Parse(address)
	must(b.t, err)
	b.opened[u.Scheme+"://"+u.Host] = true
	call[any](b, "POST", "/url", map[string]any{"url": address})
}

// js runs a function body in the page and returns what it returns.
func js[T any](b *browser, script string, args ...any) T {
	b.t.Helper()
	return call[T](b, "POST", "/execute/sync", map[string]any{"script": script, "args": append([]any{}, args...)})
}

// promptly is how long a page may take for what it does at once, on a busy machine too. It is less
// than a heartbeat, which would mend much that is broken.
const promptly = heartbeat - time.Second

// wait waits until the JS expression is true.
func (b *browser) wait(what, expression string, args ...any) {
	b.t.Helper()
	b.waitFor(what, promptly, expression, args...)
}

func (b *browser) waitFor(what string, d time.Duration, expression string, args ...any) {
	b.t.Helper()
	err := b.becomes(d, expression, args...)
	require(b.t, err == nil, "%s: not within %v (%v)", what, d, err)
}

// becomes waits until a JS expression is true, and returns why it is not.
func (b *browser) becomes(d time.Duration, expression string, args ...any) error {
	script := map[string]any{"script": "return !!(" + expression + ")", "args": append([]any{}, args...)}
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		var got struct{ Value bool }
		err := try(b, "POST", "/execute/sync", script, &got)
		if err == nil && got.Value {
			return nil
		} else if time.Since(start) > d {
			return cmp.Or(err, errors.New("it is false"))
		}
	}
}

func (b *browser) find(css string) string {
	b.t.Helper()
	found := call[map[string]string](b, "POST", "/element", map[string]any{"using": "css selector", "value": css})
	for _, id := range found {
		return id
	}
	return ""
}

func (b *browser) click(css string) {
	b.t.Helper()
	call[any](b, "POST", "/element/"+b.find(css)+"/click", nil)
}

// keys types into an element; \uE007 is Enter, \uE008 Shift, \uE009 Control, \uE013 up, \uE010 End.
func (b *browser) keys(css, text string) {
	b.t.Helper()
	call[any](b, "POST", "/element/"+b.find(css)+"/value", map[string]any{"text": text})
}

func (b *browser) cdp(command string, params map[string]any) json.RawMessage {
	b.t.Helper()
	if params == nil {
		params = map[string]any{}
	}
	return call[json.RawMessage](b, "POST", "/goog/cdp/execute", map[string]any{"cmd": command, "params": params})
}

// media sets what the page is told of the reader: media features as in CSS.
func (b *browser) media(features map[string]string) {
	b.t.Helper()
	var list []any
	for name, value := range features {
		list = append(list, map[string]any{"name": name, "value": value})
	}
	b.cdp("Emulation.setEmulatedMedia", map[string]any{"features": list})
}

func (b *browser) size(width, height int) {
	b.t.Helper()
	b.cdp("Emulation.setDeviceMetricsOverride", map[string]any{
		"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false})
}

func (b *browser) newTab() string {
	b.t.Helper()
	tab := call[struct{ Handle string }](b, "POST", "/window/new", map[string]any{"type": "tab"}).Handle
	b.toTab(tab)
	b.inject(short)
	return tab
}

func (b *browser) tab() string { b.t.Helper(); return call[string](b, "GET", "/window", nil) }

func (b *browser) toTab(tab string) {
	b.t.Helper()
	call[any](b, "POST", "/window", map[string]any{"handle": tab})
}

// enter opens a page of the room and waits until it is live.
func (b *browser) enter(url string) {
	b.t.Helper()
	b.open(url)
	b.wait("the page is live", "document.body.dataset.state === 'live'")
}

// settle waits until the page has drawn what it was told: events of scrolling and of sizes are over.
func (b *browser) settle() {
	b.t.Helper()
	js[any](b, "return new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)))")
}

// login goes through the login page, and waits until the room is there.
func (b *browser) login(url, name string) {
	b.t.Helper()
	b.open(url + "/login")
	js[any](b, "document.getElementById('user').value = ''")
	b.keys("#user", name+"\uE007")
	b.wait("the room is live", "document.body.dataset.state === 'live'")
}

// say writes a message and presses Enter.
func (b *browser) say(text string) { b.t.Helper(); b.keys("#text", text+"\uE007") }

// says is say for what is seen in the log then.
func (b *browser) says(text string) { b.t.Helper(); b.say(text); b.hasText(text) }

// hasText waits until the log holds a row with this text.
func (b *browser) hasText(text string) {
	b.t.Helper()
	b.wait(fmt.Sprintf("%q is in the log", text),
		"[...document.querySelectorAll('#log .text')].some(n => n.textContent === arguments[0])", text)
}

// A check is what must become true on the page: a sentence, and a JS expression for it.
type check struct{ what, js string }

// checks reports every check that does not become true.
func (b *browser) checks(list ...check) {
	b.t.Helper()
	for _, c := range list {
		err := b.becomes(promptly, c.js)
		expect(b.t, err == nil, "not so: %s (%s) %v", c.what, c.js, err)
	}
}

// ---- pages: what is seen ----

// Short names for the scripts of the checks.
const short = `
	window.$ = (css) => document.querySelector(css);
	window.$$ = (css) => [...document.querySelectorAll(css)];
	window.texts = () => $$('#log .text').map((n) => n.textContent);
	window.count = (text) => texts().filter((t) => t === text).length;
	window.row = (text) => $$('#log .row').find((n) => n.querySelector('.text').textContent === text);
	window.seen = (node) => { const s = getComputedStyle(node), r = node.getBoundingClientRect();
		return s.display !== 'none' && s.visibility !== 'hidden' && r.width > 1 && r.height > 1; };
	window.state = () => document.body.dataset.state;
	window.bottom = () => { const l = $('#log'); return l.scrollHeight - l.scrollTop - l.clientHeight; };
	window.hide = (hidden) => { // as the browser does with a tab that is not in front
		Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
		document.dispatchEvent(new Event('visibilitychange')); };
`

// visit is a browser that has logged in, through a relay, to a chat of its own.
func visit(t *testing.T, language ...string) (*browser, *pageRelay) {
	t.Helper()
	b := startBrowser(t, language...)
	p := startPageRelay(t, startRoom(t).url)
	b.login(p.url(), "小明")
	return b, p
}

func TestPageTwoPeople(t *testing.T) {
	t.Parallel()
	a, p := visit(t)
	b := startBrowser(t)
	b.login(p.url(), "Ada")

	a.checks(
		check{"the page greets the name", "$('.me').textContent === '小明'"},
		check{"an empty room says so", "seen($('#empty')) && $('#log').getAttribute('aria-busy') === 'false'"},
	)
	a.say("hello")
	b.checks(
		check{"the other one reads it, once", "count('hello') === 1"},
		check{"with the name", "row('hello').querySelector('bdi').textContent === '小明'"},
		check{"and the time", `/^\d\d:\d\d$/.test(row('hello').querySelector('time').textContent)`},
		check{"it is not the reader's own", "!row('hello').classList.contains('own')"},
		check{"the empty room's line is gone", "!seen($('#empty'))"},
	)
	a.checks(
		check{"the writer's own row is marked", "row('hello').classList.contains('own')"},
		check{"it stands on the right: not by colour alone", "(r => innerWidth / 2 < r.left && r.right < innerWidth)(row('hello').querySelector('.text').getBoundingClientRect())"},
		check{"the unsent row is gone", "!$('#unsent').children.length"},
		check{"the field is empty and has the focus", "$('#text').value === '' && document.activeElement === $('#text')"},
	)
	b.say("你好")
	a.hasText("你好")
	b.say("second")
	a.checks(
		check{"messages of one author are grouped", "row('second').classList.contains('follows') && !row('你好').classList.contains('follows')"},
		check{"with the name only to be read out and copied", "row('second').innerText.includes('Ada') && !seen(row('second').querySelector('.who'))"},
		check{"the colour is the name's", "row('second').style.getPropertyValue('--author') === 'var(--a' + (65 + 100 + 97) % 12 + ')'"},
		check{"and is used", "getComputedStyle(row('你好').querySelector('bdi')).color === 'rgb(102, 70, 168)'"},
	)

	a.keys("#text", "one\uE008\uE007\uE000two")
	a.checks(check{"Shift+Enter breaks the line", `$('#text').value === 'one\ntwo' && count('one\ntwo') === 0`})
	a.keys("#text", "\uE009\uE008\uE007\uE000")
	a.checks(check{"Ctrl+Enter always sends, with Shift too", `count('one\ntwo') === 1 && getComputedStyle(row('one\ntwo').lastElementChild).whiteSpace.startsWith('pre-wrap')`})
	a.keys("#text", "\uE013")
	a.checks(check{"↑ in an empty field brings back the last message", `$('#text').value === 'one\ntwo'`})
	js[any](a, "$('#text').value = ''")
	a.keys("#text", "   \uE007")
	a.keys("#text", "x\uE007")
	a.hasText("   x")
	a.checks(check{"a blank message is not sent", "texts().every((t) => t.trim())"})

	js[any](a, "$('#text').value = 'a'.repeat(3199); $('#text').dispatchEvent(new Event('input'))")
	a.keys("#text", "b")
	a.checks(check{"a counter from 3200", "$('#notice').textContent === '800 characters left'"})
	js[any](a, "$('#text').value = '👍'.repeat(4003); $('#text').dispatchEvent(new Event('input'))")
	a.checks(check{"over 4000 says by how much", "$('#notice').textContent === 'Too long by 3.' && $('#send').disabled"})
	a.keys("#text", "\uE007")
	a.checks(check{"and keeps the text", "$('#text').value.length === 8006 && !$('#unsent').children.length"})
	js[any](a, "$('#text').value = '界'.repeat(4000); $('#text').dispatchEvent(new Event('input'))")
	a.keys("#text", "\uE007")
	a.checks(check{"4000 go through", "count('界'.repeat(500)) === 1 && $('#log .more')"})
	a.click("#log .more")
	a.checks(check{"all of them", "count('界'.repeat(4000)) === 1"})

	tries, messages := p.posts()
	expect(t, tries == 6 && messages == 6, "six messages, none blank, none too long: %d POSTs, %d keys", tries, messages)

	js[any](a, `navigator.clipboard === undefined || console.error('a secure context')`)
	a.click("#logout button")
	a.wait("logged out", "location.pathname === '/login'")
	a.checks(check{"logging out drops draft and outbox", "sessionStorage.getItem('/') === null"})
}

func TestPageText(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	for _, text := range []string{
		"<b>bold</b>", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;i&gt; &amp;",
		"javascript:alert(1)", "</template><h1>x", "{{.Name}}", "a\tb  c", "\u202eabc", `"quotes' and \n`, "e\u0301 👩‍💻 ½",
	} {
		p.says(b, "李雷", text)
		b.checks(check{"markup stays text: " + text, "!$('#log .row:last-child .text').children.length"})
	}
	for _, c := range []struct{ text, links string }{
		{"see https://go.dev/doc.", "https://go.dev/doc"},
		{"(https://en.wikipedia.org/wiki/Go_(game))", "https://en.wikipedia.org/wiki/Go_(game)"},
		{"看 https://example.com/a，还有 http://example.com/b。", "https://example.com/a http://example.com/b"},
		{"https://example.com/?q=1&x=%20#top!", "https://example.com/?q=1&x=%20#top"},
		{"http:// and https://. and ftp://example.com", ""},
		{"https://[bad", ""},
		{"https://go.dev/(a)" + strings.Repeat(")", 382), "https://go.dev/(a)"},
		{"https://go.dev/" + strings.Repeat("(", 190) + strings.Repeat(").", 190), "https://go.dev/" + strings.Repeat("(", 190) + strings.Repeat(").", 189) + ")"},
		{"HTTPS and www.example.com", ""},
		{"Https://Go.dev/ as phones write it", "Https://Go.dev/"},
		{"https://münchen.example/a", "https://münchen.example/a"},
		{"https://zh.example/wiki/中文，好", "https://zh.example/wiki/中文"},
		{"（https://example.com/x）[https://example.com/y]", "https://example.com/x https://example.com/y"},
		{"https://example.com/a[1] https://example.com/a[1]]", "https://example.com/a[1] https://example.com/a[1]"},
		{"http://chat.test@evil.example/ https://a:b@evil.example/", ""},
		{"http:///evil.example", ""},
	} {
		p.says(b, "李雷", c.text)
		same(t, js[string](b, "return [...$('#log .row:last-child .text').querySelectorAll('a')].map((a) => a.textContent).join(' ')"), c.links,
			"%.200q has the links", c.text)
	}
	p.says(b, "李雷", "a link https://example.com/")
	b.checks(check{"a link tells its target nothing", `(a => a.rel === 'noopener noreferrer nofollow' && a.target === '_blank' && a.href === 'https://example.com/')($('#log .row:last-child a'))`})

	for _, c := range []struct{ text, want string }{
		{"before\n```python\n<b>x</b> = `1`\n\n\ty\n```\nafter `code` end", "before|PRE python:<b>x</b> = `1`\n\n\ty|after |CODE:code| end"},
		{"代码：```\nint a;\n```\n谢谢", "代码：|PRE:int a;|谢谢"},
		{"   ```  go  vet\n    a\n b\n  ```", "PRE go: a\nb"},
		{"````\n```\n````\nend", "PRE:```|end"},
		{"```\nnever closed\n\nlast", "PRE:never closed\n\nlast"},
		{"```" + strings.Repeat("j", 400) + "\nx", "PRE " + strings.Repeat("j", 20) + ":x"},
		{"``a`b`` and `` ` `` and ```print(1)```", "CODE:a`b| and |CODE:`| and |CODE:print(1)"},
		{"```", "```"},
		{"code: ```print(1)```\nno block", "code: |CODE:print(1)|\nno block"},
		{"https://a.example b", "A:https://a.example| b"},
		{"use ``` or ``two\nlines``", "use ``` or ``two\nlines``"},
		{strings.Repeat("`a` ", 60), strings.Repeat("CODE:a| |", 39) + "CODE:a|" + strings.Repeat(" `a`", 20) + " "},
	} {
		p.send(frame(id(), "[10:00:00] 李雷: "+c.text))
		js[any](b, "window.parts = (node) => [...node.childNodes].map((n) => { const pre = n.querySelector?.('pre'); return pre ? ['PRE', pre.dataset.language].filter(Boolean).join(' ') + ':' + pre.textContent : n.nodeName === '#text' ? n.data : n.nodeName + ':' + n.textContent; }).join('|')")
		b.wait(fmt.Sprintf("%.60q becomes %.60q", c.text, c.want), "$('#log .row:last-child .text') && parts($('#log .row:last-child .text')) === arguments[0]", c.want)
	}
	b.checks(
		check{"code takes the width it needs", "(w => w > 100 && w < 400)($$('#log pre').find((n) => n.textContent === 'int a;').closest('.text').offsetWidth)"},
	)
	b.checks(check{"`code` is in monospace", "/mono/i.test(getComputedStyle($('#log code')).fontFamily) && /mono/i.test(getComputedStyle($('#log pre')).fontFamily)"})
	p.send(frame(id(), "[10:00:00] 李雷: ```go\nfunc main() {\n\tx()\n}\n```"))
	b.wait("a block", "$('#log .row:last-child pre') && $('#log .row:last-child pre').textContent.startsWith('func')")
	b.click("#log .row:last-child .copy")
	b.checks(check{"its button says what it did", "$('#log .row:last-child .copy').textContent === 'Copied'"})
	same(t, b.pasted(), "func main() {\n\tx()\n}", "the button of a block copied")
	b.checks(check{"and what it is for", "$('#log .row:last-child .copy').textContent === 'Copy'"})

	lines := strings.Repeat("line\n", 29) + "last"
	p.send(frame(id(), "[10:00:00] 李雷: "+lines))
	b.checks(check{"a long text shows ten lines", `$('#log .more') && $('#log .more').textContent === 'Show all 30 lines' && texts().at(-1) === 'line\n'.repeat(9) + 'line'`})
	b.checks(check{"the button stands in line with the text", `(() => {
		const left = (node) => { const r = document.createRange(); r.selectNodeContents(node); return r.getBoundingClientRect().left; };
		return Math.abs(left($('#log .more').firstChild) - left($('#log .row:last-child .text').firstChild)) < .5; })()`})
	p.says(b, "李雷", "the next one")
	js[any](b, "getSelection().setBaseAndExtent(row(arguments[0]).querySelector('.text').firstChild, 0, row('the next one').querySelector('.text').firstChild, 3)", strings.Repeat("line\n", 9)+"line")
	b.command("copy")
	got := strings.Join(strings.Fields(b.pasted()), " ")
	expect(t, strings.HasPrefix(got, strings.ReplaceAll(lines, "\n", " ")) && strings.HasSuffix(got, "the") && !strings.Contains(got, "Show"),
		"a folded text and the next one are copied as %q", got)
	b.checks(check{"and it is folded as before", "texts().at(-2) === 'line\\n'.repeat(9) + 'line'"})
	b.click("#log .more")
	b.hasText(lines)
	b.checks(check{"unfolded, without the button", "!$('#log .more')"})
	p.send(frame(id(), "[10:00:00] 李雷: "+strings.Repeat("字", 480)+"https://example.com/"+strings.Repeat("a", 500)))
	b.wait("a text of many characters too", "$('#log .more')")
	b.checks(
		check{"is folded, no link is cut", "$('#log .more').textContent === 'Show all' && texts().at(-1) === '字'.repeat(480) && !$('#log .row:last-child a')"},
		check{"to at most ten lines", "(n => n.offsetHeight <= 10 * parseFloat(getComputedStyle(n).lineHeight) + 17)($('#log .row:last-child .text'))"},
	)
	js[any](b, "$('#log .more').remove()")
	b.size(340, 700)
	narrow := strings.Repeat("字 ", 200)
	p.send(frame(id(), "[10:00:00] 李雷: "+narrow))
	b.checks(check{"and one that is over twelve lines as drawn", "$('#log .more') && $('#log .more').textContent === 'Show all' && texts().at(-1) === '字 '.repeat(200)"})
	b.click("#log .more")
	b.checks(check{"what was hidden is higher than the button was", "$('#log .row:last-child .text').offsetHeight > 12 * 24 && !$('#log .more')"})
	b.size(1280, 800)

	p.send(frame("0.abcdefgh", "hi there: from <redis-cli>"))
	b.hasText("hi there: from <redis-cli>")
	b.checks(check{"a foreign line is text without an author", "!$('#log .row:last-child .who')"})
	p.says(b, "שרה", "שלום everybody")
	p.send(frame(id(), "[10:00:00] שרה: שלום `a = 1` https://example.com/a?b=1"))
	b.wait("code and a link in it", "$('#log .row:last-child code') && $('#log .row:last-child a')")
	b.checks(check{"code and links go from left to right in any text, and turn nothing around them", "['code', 'a'].every((css) => (s => s.direction === 'ltr' && s.unicodeBidi === 'isolate')(getComputedStyle($('#log .row:last-child ' + css))))"})
	b.checks(check{"a text has its own direction", "getComputedStyle($('#log .row:last-child .text')).direction === 'rtl' && getComputedStyle($('#log .row:last-child')).direction === 'ltr'"})
	p.send(gapAndPing)
	b.checks(check{"a gap is a line", "$('#log .gap') && $('#log .gap').textContent === 'Messages may be missing here'"})
	p.send(frame("the-same-id-twice-1", "[10:00:00] 李雷: twice") + frame("the-same-id-twice-1", "[10:00:00] 李雷: twice"))
	p.says(b, "李雷", "after it")
	b.checks(check{"an id is shown once", "count('twice') === 1"})
}

// pasted is what the clipboard holds. It is pasted into the field, which is empty then.
func (b *browser) pasted() string {
	b.t.Helper()
	js[any](b, "document.activeElement.blur(); getSelection().removeAllRanges(); $('#text').value = ''; $('#text').focus()")
	b.command("paste")
	text := js[string](b, "return $('#text').value")
	js[any](b, "$('#text').value = ''; $('#text').dispatchEvent(new Event('input'))")
	return text
}

// command does what a menu or a key of the browser would: copy, paste.
func (b *browser) command(name string) {
	b.t.Helper()
	b.cdp("Input.dispatchKeyEvent", map[string]any{"type": "keyDown", "key": "F24", "commands": []string{name}})
	b.cdp("Input.dispatchKeyEvent", map[string]any{"type": "keyUp", "key": "F24"})
}

var lastID atomic.Int64

// id draws the next id for a frame.
func id() string { return fmt.Sprintf("id-of-a-test-%06d", lastID.Add(1)) }

// Texts that are dear to lay out: a page of them comes in at most three times the time of a page of
// plain ones.
func TestPageHostileTexts(t *testing.T) { // alone: it measures
	b := startBrowser(t)
	const messages = 200
	fill := func(text string) (url string) {
		url = startRoom(t, "CHAT_KEY=the sessions of one room hold in the others").url
		ada := newClient(t, url).login("Ada")
		for range messages {
			ada.say(text)
		}
		b.login(url, "小明")
		return url
	}
	opens := func(url string) time.Duration {
		t.Helper()
		begun := time.Now()
		b.open(url)
		b.wait("all are there", "$$('#log .row').length === arguments[0]", messages)
		b.settle()
		return time.Since(begun)
	}
	plain := fill(strings.Repeat("word ", maxMessage/5))
	for _, c := range []struct{ what, text string }{
		{"code, 1333 times", strings.Repeat("`a`", maxMessage/3)},
		{"code between words, 1000 times", strings.Repeat("`a` ", maxMessage/4)},
		{"one letter with 3999 marks", "e" + strings.Repeat("\u0301", maxMessage-1)},
		{"many letters with many marks", strings.Repeat("e"+strings.Repeat("\u0301\u0316", 12), maxMessage/25)},
		{"Latin and Arabic letters in turn", strings.Repeat("aا", maxMessage/2)},
		{"tabs", "x" + strings.Repeat("\t", maxMessage-2) + "x"},
		{"line breaks", "x" + strings.Repeat("\n", maxMessage-2) + "x"},
		{"links", strings.Repeat("http://a.b ", maxMessage/11)},
		{"blocks of code", strings.Repeat("```\na\n```\n", maxMessage/10)},
		{"backticks that nothing closes", strings.Repeat("`a``b", maxMessage/5)},
	} {
		url := fill(c.text)
		ratio, tries := math.Inf(1), 0
		for ; ratio > 3 && tries < 5; tries++ { // a machine with other work is slow now and then
			usual := min(opens(plain), opens(plain))
			ratio = float64(opens(url)) / float64(usual)
		}
		t.Logf("%s: %.1f times as long as plain texts, at try %d", c.what, ratio, tries)
		expect(t, ratio <= 3, "%s: %.1f times as long as plain texts", c.what, ratio)
		b.checks(
			check{c.what + " is folded", "$$('.more').length === $$('#log .row').length || $('#log .text').textContent.length < 500"},
			check{c.what + " has at most 81 pieces, none of them empty", "$$('#log .text').every((n) => n.childNodes.length <= 82 && [...n.childNodes].every((c) => c.textContent || c.localName === 'span'))"},
			check{c.what + ": no more is laid out than what is seen, or little", "$('#log .text').scrollHeight <= 1.6 * $('#log .text').clientHeight"},
			check{c.what + " stays inside its row", "$('#log .row').getBoundingClientRect().height < 500 && (/clip|hidden/.test(getComputedStyle($('#log .text')).overflowY) || $('#log .text').scrollHeight <= $('#log .text').clientHeight)"},
		)
	}
}

func TestPageIME(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	key := func(kind string, code int) {
		b.cdp("Input.dispatchKeyEvent", map[string]any{"type": kind, "key": "Enter", "code": "Enter",
			"windowsVirtualKeyCode": code, "text": map[bool]string{true: "\r"}[kind == "keyDown"]})
	}
	compose := func(text string) {
		b.cdp("Input.imeSetComposition", map[string]any{"text": text, "selectionStart": len(text), "selectionEnd": len(text)})
	}
	b.click("#text")
	for text, order := range map[string]string{"你好": "keydown, compositionend", "世界": "compositionend, keydown"} {
		p.set(func() { p.keys = nil })
		compose("pinyin")
		if order[0] == 'k' { // most browsers
			js[any](b, `$('#text').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 13, isComposing: true, bubbles: true, cancelable: true}))`)
			b.cdp("Input.insertText", map[string]any{"text": text})
		} else { // Safari
			b.cdp("Input.insertText", map[string]any{"text": text})
			key("rawKeyDown", 229)
			key("keyUp", 13)
		}
		b.checks(check{"the Enter that confirms a word sends nothing (" + order + ")", "$('#text').value === '" + text + "'"})
		tries, _ := p.posts()
		expect(t, tries == 0, "%s: %d POSTs", order, tries)
		key("keyDown", 13)
		key("keyUp", 13)
		b.checks(check{"the next Enter sends it once (" + order + ")", "$('#text').value === '' && count('" + text + "') === 1"})
	}

	// Send, while letters are becoming a word: what they become is sent, whatever the engine tells first.
	for text, order := range map[string]string{
		"再见": "box.value = arguments[0]; tell('input'); tell('compositionend')",
		"明天": "tell('compositionend'); box.value = arguments[0]; tell('input')",
	} {
		p.set(func() { p.keys = nil })
		js[any](b, `window.box = $('#text'); window.tell = (type) => box.dispatchEvent(new Event(type, { bubbles: true }));
			box.focus(); tell('compositionstart'); box.value = "ni'hao"; tell('input')`)
		b.click("#send")
		time.Sleep(200 * time.Millisecond) // for what must not be sent
		tries, _ := p.posts()
		expect(t, tries == 0, "letters that are becoming a word are sent: %d POSTs", tries)
		js[any](b, order, text)
		b.checks(check{"Send sends what they become: " + order, "$('#text').value === '' && count('" + text + "') === 1"})
		b.checks(check{"and the field has the focus", "document.activeElement === $('#text')"})
	}
	b.checks(check{"never the letters", `count("ni'hao") === 0`})
	compose("duanyu")
	b.click("#send")
	b.checks(check{"a real composition ends where the field loses the focus", "count('duanyu') === 1 && $('#text').value === ''"})
}

func TestPageFaults(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	fault := func(status int) { p.set(func() { p.status["/post"] = status }) }
	once := func(text string) {
		t.Helper()
		b.waitFor("it arrives: "+text, 20*time.Second, "count(arguments[0]) >= 1", text)
		b.checks(check{"once: " + text, fmt.Sprintf("count(%q) === 1 && !$('#unsent').children.length", text)})
	}

	p.set(func() { p.delay = 700 * time.Millisecond })
	b.say("an echo")
	b.checks(
		check{"the row is there at once, as unsent", "$('#unsent .row[data-state=waiting] .text').textContent === 'an echo'"},
		check{"outside the log", "!$('#log').contains($('#unsent'))"},
	)
	js[any](b, "window.echoAt = $('#unsent .text').getBoundingClientRect().top")
	b.wait("it is in the log", "row('an echo')")
	b.checks(check{"and stays where it is when it becomes a message", "Math.abs(row('an echo').querySelector('.text').getBoundingClientRect().top - echoAt) < 1"})
	b.say("in order 1")
	b.say("in order 2")
	once("in order 1")
	once("in order 2")
	b.checks(check{"in order", "texts().indexOf('in order 1') === texts().indexOf('in order 2') - 1"})
	p.set(func() { p.delay = 0 })
	tries, messages := p.posts()
	expect(t, tries == 3 && messages == 3, "three messages, one POST at a time: %d POSTs, %d keys", tries, messages)

	// Answers that are none.
	p.set(func() { p.swallow, p.keys = true, nil })
	b.say("answer lost")
	once("answer lost")
	p.set(func() { p.swallow = false })
	for _, status := range []int{503, 429, 200} {
		fault(status)
		text := fmt.Sprintf("after %d", status)
		var before []string
		p.set(func() { before = slices.Clone(p.keys) })
		isNew := func(key string) bool { return !slices.Contains(before, key) } // the browser itself may repeat an old one
		b.say(text)
		p.until("it is refused", func() bool { return slices.ContainsFunc(p.keys, isNew) })
		b.checks(check{"a refusal leaves it waiting", "$('#unsent .row[data-state=waiting]')"})
		if status == 429 {
			b.checks(check{"too fast says how long to wait", `/^Too fast\. Wait \d s\.$/.test($('#unsent .fate span').textContent)`})
		}
		fault(0)
		once(text)
		var keys []string
		p.set(func() { keys = slices.DeleteFunc(slices.Clone(p.keys), func(key string) bool { return !isNew(key) }) })
		expect(t, len(keys) >= 2 && len(slices.Compact(slices.Sorted(slices.Values(keys)))) == 1,
			"a message that is refused first is posted with the keys %q", keys)
	}

	// Answers that are final.
	for _, status := range []int{413, 422} {
		for _, n := range []int{1, 3199, 3200, 4000} { // from 3200 on the field has a counter
			fault(status)
			js[any](b, "$('#text').value = '界'.repeat(arguments[0])", n)
			b.keys("#text", "\uE007")
			b.checks(check{fmt.Sprintf("%d for %d characters gives them back and says why", status, n), fmt.Sprintf(
				"$('#text').value === '界'.repeat(%d) && $('#notice').textContent === 'The server did not take this message.' && !$('#unsent').children.length", n)})
		}
		js[any](b, "$('#text').value = ''")
	}
	fault(503)
	b.say("first refused")
	b.say("second refused")
	b.keys("#text", "being ")
	fault(422)
	b.checks(check{"two come back in order, behind what is being written", `$('#text').value === 'being \nfirst refused\nsecond refused'`})
	b.checks(check{"where the cursor stays", "$('#text').selectionStart === 'being '.length && $('#text').selectionEnd === 'being '.length"})
	js[any](b, "$('#text').value = ''")
	fault(400)
	b.say("refused")
	b.checks(check{"what is refused says so", "$('#unsent .row[data-state=failed] .fate').innerText.replace(/\\s+/g, ' ') === 'Not sent Retry Delete'"})
	fault(0)
	b.says("passes it")
	b.click("#unsent [value=retry]")
	once("refused")
	fault(400)
	b.say("deleted")
	b.wait("it failed", "$('#unsent [data-state=failed]')")
	b.click("#unsent [value=delete]")
	b.checks(check{"Delete can be undone", "$('#unsent [data-state=deleted] .fate').innerText.replace(/\\s+/g, ' ') === 'Deleted Undo'"},
		check{"but does not come again with a reload", "!JSON.parse(sessionStorage.getItem('/')).letters.length"})
	b.click("#unsent [value=undo]")
	b.checks(check{"it is as it was", "$('#unsent [data-state=failed]') && seen($('#unsent [value=retry]'))"})
	b.click("#unsent [value=delete]")
	b.waitFor("after five seconds Delete has deleted", 10*time.Second, "!$('#unsent').children.length && !sessionStorage.getItem('/').includes('deleted')")

	// Time. The page's clock is put forward rather than waited for.
	const clock = "window.late = arguments[0]; window.realNow ??= Date.now; Date.now = () => realNow() + late"
	fault(503)
	b.say("for a minute")
	b.wait("waits", "$('#unsent [data-state=waiting]')")
	js[any](b, clock, 61_000)
	b.checks(check{"after a minute of a live connection it counts as not sent", "$('#unsent [data-state=failed]')"})
	fault(0)
	p.stop()
	b.say("old")
	js[any](b, clock, 61_000+601_000)
	p.start()
	b.waitFor("it comes back by itself", 20*time.Second, "state() === 'live'")
	b.checks(check{"after ten minutes it goes only by Retry", "$$('#unsent [data-state=failed]').length === 2"})
	b.says("young")
	b.checks(check{"which the others wait for", "count('old') === 0 && $$('#unsent .row').length === 2"})
	b.click("#unsent [value=retry]")
	b.hasText("for a minute")
	b.click("#unsent [value=retry]")
	once("old")

	// The server is away for five seconds, while somebody types; then the page is loaded again.
	b.keys("#text", "a dra")
	p.stop()
	b.keys("#text", "ft")
	lost := time.Now()
	b.checks(check{"a short loss is not worth a banner", "state() === 'live'"})
	b.wait("the banner", "state() === 'reconnecting'")
	d := time.Since(lost)
	expect(t, d >= 1500*time.Millisecond, "the banner came after %v", d)
	b.checks(check{"it says what it is", "$('#status').textContent === 'Connection lost. Reconnecting… You can keep writing.' && $('#status').getBoundingClientRect().width > innerWidth / 2"})
	online := "Object.defineProperty(navigator, 'onLine', { value: arguments[0], configurable: true }); dispatchEvent(new Event(arguments[0] ? 'online' : 'offline'))"
	js[any](b, online, false)
	b.checks(check{"without a network it says so", "state() === 'offline' && $('#status').textContent === 'You are offline. Messages will be sent later.'"})
	js[any](b, online, true)
	b.checks(check{"and with one it tries again", "state() === 'reconnecting'"})
	js[any](b, "$('#text').value = ''")
	b.say("while away 1")
	b.say("while away 2")
	b.keys("#text", "a draft")
	time.Sleep(time.Until(lost.Add(5 * time.Second)))
	p.start()
	b.waitFor("it comes back by itself", 20*time.Second, "state() === 'live'")
	once("while away 1")
	once("while away 2")
	b.checks(check{"what was being typed is still there", "$('#text').value === 'a draft'"})

	// An answer of 503 ends an EventSource for good.
	var before int
	p.set(func() { p.status["/stream"], before = 503, len(p.opened) })
	p.restart()
	p.opens(before, "the stream is asked for again")
	b.wait("lost", "state() === 'reconnecting'")
	p.set(func() { p.status["/stream"] = 0 })
	b.waitFor("it comes back after 503", 8*time.Second, "state() === 'live'")

	// Reload with a draft and an outbox.
	fault(503)
	b.say(" and more")
	b.wait("waits", "$('#unsent .row')")
	b.keys("#text", "second draft")
	b.open(p.url())
	b.checks(check{"a reload keeps draft and outbox", "$('#text').value === 'second draft' && $('#unsent .text').textContent === 'a draft and more'"})
	fault(0)
	once("a draft and more")
	fault(401)
	b.say(" 401")
	b.wait("the login page", "location.pathname === '/login'")
	fault(0)
	b.login(p.url(), "小明")
	once("second draft 401")
	fault(503)
	b.say("a letter of 小明")
	b.wait("waits", "$('#unsent .row')")
	b.keys("#text", "a draft of 小明")
	b.open(p.url() + "/login")
	fault(0)
	b.login(p.url(), "小明明")
	b.checks(
		check{"under a name that was typed a little differently the draft is there", "$('#text').value === 'a draft of 小明'"},
		check{"and what waits is not sent without asking", "$('#unsent [data-state=failed] .fate span').textContent === 'Not sent as 小明' && count('a letter of 小明') === 0"},
	)
	b.open(p.url())
	b.wait("reloaded, it asks again", "$('#unsent [data-state=failed] .fate span').textContent === 'Not sent as 小明'")
	b.click("#unsent [value=retry]")
	once("a letter of 小明")
	b.checks(check{"under the new name", "row('a letter of 小明').querySelector('bdi').textContent === '小明明'"})

	p.set(func() { p.status["/stream"] = 401 })
	p.restart()
	b.wait("a stream that wants a session: the login page", "location.pathname === '/login'")
}

// A message whose event is lost: the gap tells of it, before or after the answer.
func TestPageOwnMessageInAGap(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	p.says(b, "Ada", "before")
	gap := func(n int) {
		t.Helper()
		p.send(gapAndPing)
		b.wait("the gap is seen", "$$('.gap').length === arguments[0]", n)
	}
	alone := "count(arguments[0]) === 1 && !$('#unsent').children.length"
	answer := func(status int) { p.set(func() { p.status["/post"] = status }) }

	answer(204) // the server gets nothing, so that no event comes
	b.say("answer, then gap")
	b.wait("the answer is here", "$('#unsent [data-state=sent]')")
	gap(1)
	b.wait("it is in the log", alone, "answer, then gap")

	answer(503)
	p.set(func() { p.keys = nil })
	b.say("gap, then answer")
	p.until("it is tried", func() bool { return len(p.keys) > 0 })
	gap(2)
	b.checks(check{"what nobody has answered for waits", "count('gap, then answer') === 0 && $('#unsent [data-state=waiting]')"})
	answer(204)
	b.waitFor("it is in the log, before any heartbeat", 5*time.Second, alone, "gap, then answer")

	var key string
	p.set(func() { key = p.keys[0] })
	p.send(frame(key+"~abcdefgh", "[10:00:00] 小明: gap, then answer") + frame(id(), "[10:00:00] 小明: behind it"))
	b.hasText("behind it")
	b.wait("once, if its event comes after all", alone, "gap, then answer")

	p.set(func() { p.keys = nil })
	b.say("in the history")
	b.wait("the answer is here", "$('#unsent [data-state=sent]')")
	p.set(func() { key = p.keys[0] })
	p.send("event: gap\ndata:\n\n" + frame(id(), "[10:00:00] Ada: before that") + frame(key+"~abcdefgh", "[10:00:00] 小明: in the history") +
		frame(id(), "[10:00:00] Ada: behind that") + "event: ping\ndata:\n\n")
	b.hasText("behind that")
	b.wait("it is in the log", alone, "in the history")
	b.checks(check{"at its place in the history that comes again, which did not reach back", "texts().slice(-3).join() === 'before that,in the history,behind that' && $$('.gap').length === 3"})
}

// gapAndPing tells of a gap that nothing follows.
const gapAndPing = "event: gap\ndata:\n\nevent: ping\ndata:\n\n"

// An id is a key and, behind a ~, a tail of the server's: the key says which message it is, the
// whole id is a place in the stream.
func TestPageKeys(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	p.set(func() { p.status["/post"] = 204 }) // the server gets nothing, so that no event comes
	b.say("mine")
	p.until("it is posted", func() bool { return len(p.keys) > 0 })
	var key string
	p.set(func() { key = p.keys[0] })
	b.wait("the answer is here", "$('#unsent [data-state=sent]')")
	p.send(frame(key+"~abcdefgh", "[10:00:00] 小明: mine"))
	b.wait("a letter is known by its key", "count('mine') === 1 && !$('#unsent').children.length")
	p.send(frame(key+"~bcdefghi", "[10:00:00] 小明: mine") + frame(key+"~bcdefghi.1", "[10:00:00] 小明: foreign") +
		frame(key+"~bcdefghi.2", "[10:00:00] 小明: foreign"))
	b.checks(
		check{"foreign lines behind it have keys of their own", "count('foreign') === 2"},
		check{"another tail is a second copy", "count('mine') === 1"},
	)
	p.send(frame("key-of-a-message-last~cdefghij", "[10:00:00] 小明: last"))
	b.hasText("last")
	var before int
	p.set(func() { before = len(p.opened); p.status["/stream"] = 503 })
	p.restart()
	p.opens(before, "the stream is asked for again")
	p.set(func() { before = len(p.opened); p.status["/stream"] = 0 })
	p.opens(before, "and again")
	p.set(func() {
		query, _ := url.ParseQuery(p.opened[len(p.opened)-1])
		expect(t, query.Get("after") == "key-of-a-message-last~cdefghij", "reopened by %q, want the whole id", query)
	})
}

// After a gap the history comes again: rows that are new find their place among those that are
// there, and the line is drawn only where the history does not reach back to one of them.
func TestPageHistoryAgain(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.size(800, 400)
	line := func(key, who string) string {
		return frame("key-of-a-message-"+key+"~abcdefgh", "[10:00:00] "+who+": "+key)
	}
	var old strings.Builder
	for i := range 60 {
		old.WriteString(frame(id(), fmt.Sprintf("[09:00:00] Ada: old %d", i)))
	}
	p.send(old.String() + line("a", "Ada") + line("b", "Ada") + line("c", "Ada"))
	b.hasText("c")
	js[any](b, `$('#log').scrollTop = 900; window.removed = 0;
		window.top1 = row('old 40'); window.y1 = top1.getBoundingClientRect().top;
		new MutationObserver((all) => all.forEach((m) => removed += m.removedNodes.length)).observe($('#log'), { childList: true, subtree: true })`)
	b.settle()
	const gap = "event: gap\nid: gap-0000000000000000~abcdefgh\ndata:\n\n"
	const ping = "event: ping\nid: gap-0000000000000000~abcdefgh\ndata:\n\n"
	again := func(key, who string) string { return strings.Replace(line(key, who), "~abcdefgh", "~zzzzzzzz", 1) }
	p.send(gap + again("x", "李雷") + again("a", "Ada") + again("y", "Ada") + again("z", "李雷") + again("b", "Ada") + again("c", "Ada") +
		again("d", "Ada") + ping + line("e", "Ada"))
	b.hasText("e")
	b.checks(
		check{"what is new is at its place, each once", "texts().slice(60).join('') === 'xayzbcde'"},
		check{"the history reached back: no line", "!$('.gap')"},
		check{"names are shown where the author changes", "['x', 'a', 'z', 'b'].every((k) => !row(k).classList.contains('follows')) && ['y', 'c', 'd', 'e'].every((k) => row(k).classList.contains('follows'))"},
		check{"nothing that was there was taken away, and the reader was not moved", "removed === 0 && Math.abs(top1.getBoundingClientRect().top - y1) < 1"},
		check{"the pill counts each once", "$('#pill').textContent === '5 new messages'"},
	)
	b.click("#pill")
	p.send(gap + again("far", "Ada") + again("away", "Ada"))
	b.settle()
	b.checks(check{"until all of it is here nobody can tell", "count('far') === 0 && !$('.gap')"})
	p.send(ping)
	b.checks(
		check{"a history that does not reach back: a line before it", "texts().slice(60).join(' ') === 'x a y z b c d e far away' && $$('.gap').length === 1 && $('.gap').nextElementSibling === row('far')"},
		check{"and the name behind the line", "!row('far').classList.contains('follows')"},
		check{"the end is in sight", "bottom() < 2"},
	)
	p.send(gap + again("one", "Ada") + gap + again("one", "Ada") + again("two", "Ada") + ping)
	b.checks(check{"a gap while the history comes again", "texts().slice(70).join(' ') === 'one two' && $$('.gap').length === 2 && $$('.gap')[1].nextElementSibling === row('one')"})
}

// The worker knows the place of a gap, whose id is one like any other's.
func TestPageWorkerKnowsGaps(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.says("before")
	p.send("event: gap\nid: gap-1111111111111111~abcdefgh\ndata:\n\n" + frame("key-of-a-message-h~abcdefgh", "[10:00:00] Ada: history") +
		"event: ping\nid: gap-2222222222222222~abcdefgh\ndata:\n\n" + frame("key-of-a-message-l~abcdefgh", "[10:00:00] Ada: live"))
	b.hasText("live")
	for after, want := range map[string]string{
		"gap-1111111111111111~abcdefgh": "message ping message ping",
		"gap-2222222222222222~abcdefgh": "message ping",
		"key-of-a-message-l~abcdefgh":   "ping",
		"gap-3333333333333333~abcdefgh": "unknown",
	} {
		got := js[string](b, `return new Promise((done) => {
			const policy = window.policy ??= trustedTypes.createPolicy('test', { createScriptURL: (url) => url });
			const { port } = new SharedWorker(policy.createScriptURL('/assets/stream.js'), { type: 'module', name: 'chat' });
			port.onmessage = ({ data }) => {
				if (data[0].type === 'hello') return port.postMessage({ after: arguments[0] });
				port.postMessage({ bye: true });
				done(data.map((e) => e.type).join(' '));
			}; })`, after)
		same(t, got, want, "a tab that comes back with %s is told", after)
	}
}

// Everything at once, by chance: what is written arrives once, and in order.
func TestPageStorm(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(uint64(seed), 0))
	const messages = 24
	for i := range messages {
		b.say(fmt.Sprintf("storm %d", i))
		switch chance.IntN(6) {
		case 0:
			p.restart()
		case 1:
			p.set(func() { p.swallow = !p.swallow })
		case 2:
			p.set(func() { p.status["/post"] = 503 - p.status["/post"] })
		case 3:
			p.set(func() { p.status["/stream"] = 503 - p.status["/stream"] })
		case 4:
			js[any](b, "location.reload()")
		}
		b.wait("the page", "document.readyState === 'complete' && $('#text')")
	}
	p.set(func() { p.swallow = false; clear(p.status) })
	want := make([]string, messages)
	for i := range want {
		want[i] = fmt.Sprintf("storm %d", i)
	}
	b.waitFor("all arrive, once and in order", 40*time.Second,
		"JSON.stringify(texts().filter((s) => s.startsWith('storm'))) === JSON.stringify(arguments[0]) && !$('#unsent').children.length", want)
	b.open(p.url())
	b.waitFor("also for a newcomer", 10*time.Second,
		"JSON.stringify(texts().filter((s) => s.startsWith('storm'))) === JSON.stringify(arguments[0])", want)
}

// Back from another page, perhaps out of the browser's cache, whose stream is of unknown health.
func TestPageBack(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.says("before")
	other := newClient(t, p.target).login("Ada")
	b.open(p.url() + "/login")
	other.say("meanwhile")
	call[any](b, "POST", "/back", nil)
	b.waitFor("what came meanwhile", 4*time.Second, "count('meanwhile') === 1")
	other.say("after")
	b.hasText("after")
	t.Log("from the cache:", js[bool](b, "return performance.getEntriesByType('navigation')[0].type !== 'back_forward'"))
	b.checks(check{"each once", "count('before') === 1 && count('meanwhile') === 1 && count('after') === 1 && !$('.gap') && state() === 'live'"})
}

// Whoever is quick writes before the script is here: the page is open, the network is slow.
func TestPageTypedEarly(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.inject(`
		new MutationObserver((_, observer) => { // scripts of the page run when all of it is read
			const box = document.getElementById('text');
			if (!box) return;
			observer.disconnect();
			box.value = window.name;
		}).observe(document, { childList: true, subtree: true });`)
	for _, c := range []struct{ what, draft, early, want string }{
		{"nothing typed early: the draft", "a draft", "", "a draft"},
		{"typed early, without a draft", "", "quick", "quick"},
		{"typed early, behind the draft", "a draft", " and more", "a draft and more"},
		{"a draft that the browser itself has put back", "a draft", "a draft", "a draft"},
	} {
		js[any](b, `$('#text').value = arguments[0]; $('#text').dispatchEvent(new Event('input'));
			window.name = arguments[1]; window.old = true`, c.draft, c.early)
		b.open(p.url())
		b.wait("live", "!window.old && state() === 'live'")
		b.checks(
			check{c.what, fmt.Sprintf("$('#text').value === %q", c.want)},
			check{c.what + ", as the next draft", fmt.Sprintf("JSON.parse(sessionStorage.getItem('/')).draft === %q", c.want)},
		)
	}
}

func TestPageHeldBack(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	p.set(func() { p.hold, p.opened = true, nil })
	b.say("before")
	p.restart()
	b.waitFor("behind a relay that holds answers back the page is live", 30*time.Second,
		"state() === 'live' && count('before') === 1")
	other := newClient(t, p.target).login("Ada")
	for i := range 3 {
		text := fmt.Sprintf("through the relay %d", i)
		other.say(text)
		b.waitFor(text, 20*time.Second, "count(arguments[0]) === 1", text)
		b.checks(check{"it stays live", "state() === 'live'"})
	}
	p.set(func() {
		expect(t, strings.Contains(strings.Join(p.opened, " "), "wait=25s"), "streams were opened by %q", p.opened)
	})
}

func TestPageTabs(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	first := b.tab()
	for range 7 {
		b.newTab()
		b.enter(p.url())
	}
	b.says("from the eighth tab")
	p.set(func() {
		same(t, len(p.opened), 1, "eight tabs have opened")
	})
	b.toTab(first)
	b.hasText("from the eighth tab")
	b.newTab()
	b.open(p.url())
	b.hasText("from the eighth tab") // a new tab gets the history

	// Hidden: no work on the page, but a count in the title.
	b.toTab(first)
	js[any](b, "hide(true)")
	p.send(frame(id(), "[10:00:00] 李雷: unseen 1") + frame(id(), "[10:00:00] 李雷: unseen 2"))
	b.checks(
		check{"the title counts what came unseen", "document.title === '(2) Chat room'"},
		check{"the icon tells too", "$('#icon').href.endsWith('/assets/unread.svg')"},
		check{"a hidden tab does no work on the page", "count('unseen 2') === 0"},
	)
	js[any](b, "hide(false)")
	b.checks(
		check{"a tab that is shown catches up", "count('unseen 1') === 1 && count('unseen 2') === 1"},
		check{"and counts from nothing", "document.title === 'Chat room' && $('#icon').href.endsWith('/assets/favicon.svg')"},
	)

	// Log out in one tab: no other one may go on under a name it does not have, or keep its draft.
	b.keys("#text", "a draft of the first tab")
	b.checks(check{"a tab keeps its draft", "sessionStorage.getItem('/').includes('first tab')"})
	second := b.newTab()
	b.enter(p.url())
	b.click("#logout button")
	b.wait("logged out", "location.pathname === '/login'")
	b.toTab(first)
	b.wait("the other tabs follow", "location.pathname === '/login'")
	b.checks(check{"and drop their drafts", "sessionStorage.getItem('/') === null"})
	b.toTab(second)
	b.keys("#user", "Ada\uE007")
	b.wait("live", "document.body.dataset.state === 'live'")
}

func TestPageWithoutWorker(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	p := startPageRelay(t, startRoom(t).url)
	without := func() {
		b.inject(`
			delete window.SharedWorker;
			const every = window.setInterval; // half a minute becomes half a second
			window.setInterval = (f, ms) => every(f, ms / 60);`)
	}
	streams := func(want int, what string) {
		t.Helper()
		p.until(what, func() bool { return len(p.streams) == want })
	}
	without()
	b.login(p.url(), "小明")
	first := b.tab()
	js[any](b, "hide(true)")
	time.Sleep(time.Second) // two of its looks around
	streams(1, "a tab that is alone keeps its stream, hidden or not")
	b.newTab()
	without()
	b.enter(p.url())
	streams(1, "a hidden tab lets go when another one has a stream")
	b.say("to the hidden one")
	js[any](b, "hide(false)") // stays as it is, wherever the driver goes
	b.toTab(first)
	js[any](b, "hide(false)")
	b.hasText("to the hidden one")
	streams(2, "a tab that is shown takes one again")
	js[any](b, "hide(true)")
	streams(1, "and lets it go again")
	b.toTab(call[[]string](b, "GET", "/window/handles", nil)[1])
	call[any](b, "DELETE", "/window", nil)
	b.toTab(first)
	streams(1, "the last one takes the stream, hidden or not")

	// A stream that is dead but looks open: whoever comes back to the page finds out.
	js[any](b, "hide(false)")
	var before int
	p.set(func() { before = len(p.opened) })
	js[any](b, "const now = Date.now; Date.now = () => now() + 25000; hide(false)")
	p.opens(before, "after 25 s of silence, a look at the page opens a new stream")
	p.set(func() {
		query := p.opened[len(p.opened)-1]
		expect(t, strings.Contains(query, "after="), "reopened by %q", query)
	})

	// Eight tabs: the hidden ones let go, so that the next one loads.
	for range 7 {
		b.newTab()
		without()
		b.enter(p.url())
		js[any](b, "hide(true)")
	}
	b.say("from the eighth tab")
	b.toTab(first)
	js[any](b, "hide(false)")
	b.hasText("from the eighth tab")
}

// A server that has not found its room yet says "wait", and pings: that is not a connection.
func TestPageWait(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	p := startPageRelay(t, startRoom(t).url)
	p.instead = "event: wait\ndata:\n\nevent: ping\ndata:\n\n"
	b.open(p.url() + "/login")
	b.keys("#user", "Ada\uE007")
	b.wait("the page", "$('#log')")
	p.opens(0, "a stream is opened")
	time.Sleep(300 * time.Millisecond) // time to believe it
	b.checks(check{"the page does not claim to be live, or the room to be empty", "state() === 'connecting' && !seen($('#empty'))"})
	p.set(func() { p.instead = "" })
	p.restart()
	b.wait("then it is, and says so", "state() === 'live' && seen($('#empty'))")
}

// A worker that never answers is one that the page does without.
func TestPageDeadWorker(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	b.inject(`
		window.SharedWorker = class { port = { postMessage() {} } };
		const later = window.setTimeout; // forty seconds become four
		window.setTimeout = (f, ms) => later(f, ms > 30000 ? ms / 10 : ms);`)
	p := startPageRelay(t, startRoom(t).url)
	b.login(p.url(), "小明")
	b.says("without it")
	p.opens(1, "silence for 38 s: a new stream")
	b.checks(check{"which is live", "state() === 'live' && count('without it') === 1"})
}

// Safari starts a worker that died anew and hands it the ports of its tabs: each joins again, and
// asks for what follows the last message it has.
func TestPageWorkerStartedAnew(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	b.inject(`
		window.asked = [];
		window.SharedWorker = class {
			constructor() {
				const { port1, port2 } = new MessageChannel();
				this.port = port1;
				window.worker = port2;
				port2.onmessage = ({ data }) => {
					if ('after' in data) asked.push(data.after);
					port2.postMessage('after' in data ? [{ type: 'ping' }] : []);
				};
				port2.postMessage([{ type: 'hello' }]);
			}
		};`)
	p := startPageRelay(t, startRoom(t).url)
	b.login(p.url(), "小明")
	b.wait("the page asks for all", "JSON.stringify(asked) === '[\"\"]'")
	js[any](b, `worker.postMessage([{ type: 'message', id: arguments[0], text: '[12:00:00] Ada: before' }, { type: 'ping', id: arguments[0] }])`, keyA)
	b.hasText("before")
	js[any](b, "worker.postMessage([{ type: 'hello' }])")
	b.wait("the page asks for what follows", "JSON.stringify(asked) === JSON.stringify(['', arguments[0]])", keyA)
	js[any](b, `worker.postMessage([{ type: 'message', id: arguments[0], text: '[12:00:00] Ada: after' }, { type: 'ping' }])`, keyB)
	b.hasText("after")
	b.checks(check{"each once, and live", "count('before') === 1 && count('after') === 1 && state() === 'live'"})
}

// Out of the back/forward cache Safari brings streams to life that were closed, so the pages start
// anew.
func TestPageOutOfTheCache(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.says("kept")
	for _, page := range []string{"/", "/lesson"} {
		b.enter(p.url() + page)
		js[any](b, "window.old = true; dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
		b.wait(page+" starts anew", "!window.old && state() === 'live'")
	}
}

// In Safari the field does not grow by itself, and the log does not keep its place.
func TestPageKeepsItsPlaceInSafari(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.inject(`
		const supports = CSS.supports.bind(CSS);
		CSS.supports = (what, ...value) => !['field-sizing', 'overflow-anchor'].includes(what) && supports(what, ...value);`)
	b.open(p.url())
	many := func(n int, text string) {
		var s strings.Builder
		for i := range n {
			s.WriteString(frame(id(), fmt.Sprintf("[10:%02d:%02d] Ada: %s %d", i/60%60, i%60, text, i)))
		}
		p.send(s.String())
	}
	b.wait("live", "state() === 'live'")
	js[any](b, "$('#log').style.overflowAnchor = 'none'; $('#text').style.setProperty('field-sizing', 'fixed')")
	many(3000, "first")
	b.waitFor("3000 rows", 20*time.Second, "texts().at(-1) === 'first 2999'")
	b.checks(check{"the end is in sight", "bottom() < 2"})
	for line := range 7 {
		b.keys("#text", "\uE008\uE007\uE000x")
		b.settle()
		b.keys("#text", "y")
		b.settle()
		b.checks(check{fmt.Sprintf("the end is in sight at line %d", line+2), "bottom() < 2"})
	}
	js[any](b, "window.row = $$('#log .row').find((n) => n.textContent.endsWith('first 2950')); row.scrollIntoView(); window.y = row.getBoundingClientRect().top")
	b.settle()
	many(4600, "second")
	b.waitFor("4600 more", 30*time.Second, "parseInt($('#pill').textContent) >= 4600")
	b.checks(check{"what is dropped above does not move the reader", "$$('#log .row').length < 5200 && Math.abs(row.getBoundingClientRect().top - y) < 100"})
}

// A new tab asks the worker how things stand: what the server says before its room is there does
// not make a lost stream good.
func TestPageNewTabWhileLost(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what  string
		opens int // until the page has surely been told
		lose  func(p *pageRelay)
	}{
		{"the server waits for its room", 1, func(p *pageRelay) { p.instead = "event: wait\ndata:\n\n" }},
		{"the server wants a session", 2, func(p *pageRelay) { p.status["/stream"], p.status["/login"] = 401, 204 }}, // 204: the page stays
	} {
		b, p := visit(t)
		var before int
		p.set(func() { c.lose(p); before = len(p.opened) })
		p.restart()
		p.opens(before+c.opens-1, c.what+": the stream is asked for again")
		b.newTab()
		b.open(p.url())
		b.wait(c.what+": a new tab says that the stream is lost", "state() === 'reconnecting'")
	}
}

func TestPageScroll(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	many := func(n int, text string) {
		var s strings.Builder
		for i := range n {
			s.WriteString(frame(id(), fmt.Sprintf("[10:%02d:%02d] %s: %s %d", i/60%60, i%60, []string{"Ada", "李雷"}[i/500%2], text, i)))
			if i%1000 == 999 {
				p.send(s.String())
				s.Reset()
			}
		}
		p.send(s.String())
	}
	many(300, "first")
	b.hasText("first 299")
	b.checks(
		check{"the end is in sight", "bottom() < 2"},
		check{"rows lie in sections of 50", "$$('#log > section').length === 6 && $$('#log > section').every((s) => s.children.length === 50 && getComputedStyle(s).contain === 'layout style')"},
	)
	js[any](b, "$('#log').scrollTop -= 200")
	b.settle()
	js[any](b, "$('#log').scrollTop += 160")
	b.settle()
	many(1, "near")
	b.hasText("near 0")
	b.checks(check{"down to 48 px of the end it follows again", "bottom() < 2 && !seen($('#pill'))"})

	js[any](b, "$('#log').scrollTop = 2000")
	b.settle()
	b.settle()
	many(1, "below")
	b.checks(check{"one new message", "$('#pill').textContent === '1 new message' && seen($('#pill'))"})
	many(2, "further below")
	b.checks(
		check{"a pill counts what is below", "$('#pill').textContent === '3 new messages'"},
		check{"the reader is not moved", "$('#log').scrollTop === 2000"},
	)
	b.click("#pill")
	b.checks(check{"the pill goes to the end, and goes", "bottom() < 2 && !seen($('#pill'))"})
	js[any](b, "$('#log').scrollTop = 2000; $('#log').focus()")
	b.keys("#log", "\uE010")
	b.checks(check{"End goes to the end", "bottom() < 2"})
	js[any](b, "$('#log').scrollTop = 2000")
	b.settle()
	b.says("mine")
	b.checks(check{"so does a message of one's own", "bottom() < 2"})

	js[any](b, `$('#log').scrollTop -= 1; $('#text').value = '\n\n\n\n'; $('#text').dispatchEvent(new Event('input'))`)
	b.checks(check{"the field grows, the end stays", "$('#text').offsetHeight > 100 && bottom() < 2"})
	b.keys("#text", strings.Repeat("\uE008\uE007\uE000", 9))
	b.checks(check{"to six lines", "$('#text').offsetHeight === 164 && bottom() < 2"})
	b.size(400, 500)
	b.checks(check{"a smaller window (rotation, keyboard) leaves the end in sight", "innerHeight === 500 && bottom() < 2"})
	b.size(1280, 800)
	js[any](b, "$('#text').value = ''")
	b.settle()

	js[any](b, "$('#log').scrollTop = 1000")
	b.settle()
	js[any](b, "window.top1 = $$('#log .row').find((n) => n.getBoundingClientRect().top > 100); window.y1 = top1.getBoundingClientRect().top")
	many(3000, "up")
	b.waitFor("3000 more", 20*time.Second, "parseInt($('#pill').textContent) >= 3000")
	b.checks(check{"nothing is dropped above somebody who reads", "$$('#log .row').length > 3300 && top1.isConnected && Math.abs(top1.getBoundingClientRect().top - y1) < 2"})
	b.click("#pill")
	many(20_000, "flood")
	b.waitFor("20 000 messages", 60*time.Second, "texts().at(-1) === 'flood 19999'")
	many(130, "more")
	b.hasText("more 129")
	b.checks(
		check{"leave at most 1050 rows", "$$('#log .row').length <= 1050 && $$('#log .row').length >= 1000"},
		check{"the first of them shows its name", "!$('#log .row').classList.contains('follows')"},
		check{"the end is in sight after 20 000", "bottom() < 2"},
	)
	p.send(frame(id(), "[11:00:00] Ada: calm"))

	// At fifty messages a second, on a processor that is six times slower.
	many(2000-1000, "rows")
	b.hasText("rows 999")
	b.cdp("Emulation.setCPUThrottlingRate", map[string]any{"rate": 6})
	js[any](b, `
		window.flushes = 0; window.frames = 0; window.from = performance.now();
		new MutationObserver(() => flushes++).observe($('#log'), { childList: true, subtree: true });
		requestAnimationFrame(function f() { frames++; requestAnimationFrame(f); })`)
	var live any
	for i := range 250 {
		p.send(frame(id(), fmt.Sprintf("[11:00:00] %s: a message at fifty a second, number %d", []string{"Ada", "李雷", "小红"}[i%3], i)))
		time.Sleep(20 * time.Millisecond)
		if i >= 100 && i%30 == 0 && live != "off" {
			live = js[any](b, "return $('#log').getAttribute('aria-live')")
		}
	}
	rates := js[[]float64](b, "const s = (performance.now() - from) / 1000; return [frames / s, flushes / s]")
	b.cdp("Emulation.setCPUThrottlingRate", map[string]any{"rate": 1})
	t.Logf("50 messages a second, processor six times slower: %.0f frames, %.1f changes of the page a second", rates[0], rates[1])
	expect(t, rates[1] <= 10.5, "%.1f flushes a second", rates[1])
	same(t, live, "off", "at 50 messages a second aria-live is")
	b.wait("all are there", "texts().at(-1).endsWith('number 249')")
	time.Sleep(2100 * time.Millisecond)
	p.send(frame(id(), "[11:00:00] Ada: calm again"))
	b.checks(check{"when it is calm, messages are announced", "texts().at(-1) === 'calm again' && $('#log').getAttribute('aria-live') === 'polite'"})
}

// In a room where somebody speaks all the time, the reader's hand decides.
func TestPageBusyRoom(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.size(800, 500)
	n := 0
	say := func(count int) {
		for range count {
			n++
			p.send(frame(id(), fmt.Sprintf("[10:00:00] Ada: busy %d", n)))
			time.Sleep(20 * time.Millisecond)
		}
		b.hasText(fmt.Sprintf("busy %d", n))
	}
	mouse := func(kind string, more map[string]any) {
		params := map[string]any{"type": kind, "x": 400, "y": 200, "button": "left", "clickCount": 1}
		maps.Copy(params, more)
		b.cdp("Input.dispatchMouseEvent", params)
	}
	say(60)
	stays := func(what string, move func()) {
		t.Helper()
		js[any](b, "$('#pill').click(); document.activeElement.blur(); getSelection().removeAllRanges(); window.before = $('#log').scrollTop")
		b.settle()
		move()
		say(20)
		b.checks(check{what + ": the reader is not pulled back", "bottom() > 100 && $('#log').scrollTop <= before && /^[12]\\d new messages$/.test($('#pill').textContent)"})
	}
	stays("the wheel", func() {
		mouse("mouseWheel", map[string]any{"deltaX": 0, "deltaY": -30, "button": "none"})
		b.wait("the wheel to turn", "$('#log').scrollTop < before")
	})
	stays("the wheel, when nothing has moved yet", func() { js[any](b, "$('#log').dispatchEvent(new WheelEvent('wheel', { deltaY: -1 }))") })
	key := func(name string) {
		js[any](b, "$('#log').focus()")
		b.keys("#log", name)
	}
	stays("Page Up", func() { key("\uE00E") })
	stays("the arrow up", func() { key("\uE013") })
	stays("a scroll bar, by one pixel", func() { js[any](b, "$('#log').scrollTop -= 1") })
	stays("a touch", func() {
		touch := func(kind string, y ...int) {
			points := []any{}
			for _, y := range y {
				points = append(points, map[string]any{"x": 300, "y": y})
			}
			b.cdp("Input.dispatchTouchEvent", map[string]any{"type": kind, "touchPoints": points})
		}
		touch("touchStart", 200)
		say(3)
		b.checks(check{"a finger that is down holds the page", "Math.abs($('#log').scrollTop - before) < 2 && bottom() > 40"})
		for y := 205; y < 260; y += 5 {
			touch("touchMove", y)
		}
		touch("touchEnd")
	})
	stays("a button that is down, and a text that is selected", func() {
		spot := js[[]float64](b, "const r = document.createRange(); r.selectNodeContents($$('#log .text').at(-4)); const q = r.getBoundingClientRect(); return [q.left, q.top + q.height / 2]")
		mouse("mousePressed", map[string]any{"x": spot[0] + 5, "y": spot[1]})
		say(5)
		b.checks(check{"a button that is down holds the page", "$('#log').scrollTop === before && bottom() > 40"})
		mouse("mouseMoved", map[string]any{"x": spot[0] + 40, "y": spot[1], "buttons": 1})
		mouse("mouseReleased", map[string]any{"x": spot[0] + 40, "y": spot[1]})
		b.checks(check{"a text is selected", "!getSelection().isCollapsed"})
	})
	js[any](b, "getSelection().removeAllRanges()")
	b.checks(check{"without a selection the end comes back into sight", "bottom() < 2 && !seen($('#pill'))"})

	// Whoever reads and begins to type wants to write.
	press := func(key string) {
		b.cdp("Input.dispatchKeyEvent", map[string]any{"type": "keyDown", "key": key, "text": key})
		b.cdp("Input.dispatchKeyEvent", map[string]any{"type": "keyUp", "key": key})
	}
	p.send(frame(id(), "[10:00:00] Ada: "+strings.Repeat("a line\n", 20)))
	b.wait("a folded text", "$('#log .more')")
	for _, css := range []string{"#log .row:last-child .text", "#log .more"} {
		b.click(css)
		press("h")
		press("i")
		b.checks(check{"after a click on " + css + " a key is written", "$('#text').value === 'hi' && document.activeElement === $('#text')"})
		js[any](b, "$('#text').value = ''; $('#text').blur()")
	}
	js[any](b, "$('#log').scrollTop = 0")
	b.settle()
	say(1)
	b.click("#pill")
	press("h")
	b.checks(check{"after the pill too", "$('#text').value === 'h' && bottom() < 2"})
	js[any](b, "$('#log').focus(); window.before = $('#log').scrollTop = 100")
	b.settle()
	press(" ")
	b.checks(check{"a space in the log scrolls", "$('#text').value === 'h' && $('#log').scrollTop > 100"})
}

// Where the clock runs back it is another day; where somebody was away, a line says what is new.
func TestPageDays(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	for _, m := range []struct{ at, text string }{
		{"23:58:00", "late"}, {"23:59:30", "later"}, {"00:01:00", "early"}, {"23:59:59", "a day of silence later"},
		{"00:02:00", "early again"}, {"09:00:00", "morning"}, {"08:55:00", "a clock that is behind"}, {"08:00:00", "the next morning"},
	} {
		p.send(frame(id(), "["+m.at+"] Ada: "+m.text))
		b.hasText(m.text)
	}
	p.send(frame(id(), "[08:00:01] 小红: hers"))
	b.hasText("hers")
	b.checks(
		check{"a line where the clock runs back", "$$('[data-day]').map((n) => n.querySelector('.text').textContent).join() === 'early,early again,the next morning'"},
		check{"which is seen", "/A new day/.test(getComputedStyle($('[data-day]'), '::before').content) && row('early').offsetHeight > row('later').offsetHeight + 20"},
		check{"another day is not grouped with the one before", "!row('early').matches('.follows') && row('later').matches('.follows')"},
	)
	js[any](b, "hide(true)")
	p.send(frame(id(), "[08:00:02] 小红: unseen") + frame(id(), "[08:00:03] 小红: unseen too"))
	b.wait("unread", "document.title.startsWith('(2)')")
	js[any](b, "hide(false)")
	b.hasText("unseen too")
	b.checks(check{"a line above the first that nobody has seen", "$$('[data-new]').length === 1 && row('unseen').dataset.new === 'New' && /New/.test(getComputedStyle(row('unseen'), '::after').content)"})
	js[any](b, "hide(true)")
	p.send(frame(id(), "[08:00:04] 小红: unseen later"))
	b.wait("unread", "document.title.startsWith('(1)')")
	js[any](b, "hide(false)")
	b.hasText("unseen later")
	b.checks(check{"there is one such line", "$$('[data-new]').length === 1 && row('unseen later').dataset.new"})
	b.checks(check{"one of a group has its time when it is looked for", "!seen(row('later').querySelector('time'))"})
	r := js[[]float64](b, "row('later').scrollIntoView(); const r = row('later').querySelector('.text').getBoundingClientRect(); return [r.left + 5, r.top + 5]")
	b.cdp("Input.dispatchMouseEvent", map[string]any{"type": "mouseMoved", "x": r[0], "y": r[1]})
	b.checks(check{"under the mouse", "seen(row('later').querySelector('time')) && row('later').querySelector('time').textContent === '23:59'"})
}

// The session is over: the room was in memory, and has been started anew.
func TestPageComingBack(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	other := startRoom(t).url
	p.set(func() { p.target = other })
	p.restart()
	b.waitFor("the new room", 20*time.Second, "state() === 'live'")
	b.say("a letter")
	b.wait("it wants a session", "location.pathname === '/login'")
	b.checks(
		check{"it says why", "/session has ended/.test($('[role=status]').textContent) && $('#user').getAttribute('aria-describedby') === $('[role=status]').id && !$('#user').ariaInvalid"},
		check{"the name is filled in", "$('#user').value === '小明'"},
	)
	b.keys("#user", "\uE007")
	b.hasText("a letter")
	b.checks(check{"and what was on its way is in the room", "count('a letter') === 1 && !$('#unsent').children.length"})

	// Without a network nobody can log out.
	b.keys("#text", "a draft")
	p.stop()
	b.click("#logout button")
	b.checks(check{"without a network logout says so", "$('#notice').textContent === 'No connection: you are still logged in.' && location.pathname === '/'"})
	b.checks(check{"and nothing is lost", "$('#text').value === 'a draft' && sessionStorage.getItem('/').includes('a draft')"})
}

// Who is sent to the login from a page comes back to that page.
func TestLoginLeadsBack(t *testing.T) {
	t.Parallel()
	room := startRoom(t, "CHAT_PASSWORD=blue whale")
	for page, want := range map[string]string{"/lesson": "/lesson", "/?view=projector": "/?view=projector",
		"/": "/", "/?view=other": "/", "/?next=//evil.example": "/"} {
		c := newClient(t, room.url)
		got := c.get(page)
		expect(t, got.status == 303 && got.header.Get("Location") == "/login", "GET %s: %d to %q", page, got.status, got.header.Get("Location"))
		c.do("POST", "/login", form("user", "", "password", "blue whale")) // refused, and still known
		got = c.do("POST", "/login", form("user", "Ada", "password", "blue whale"))
		expect(t, got.status == 303 && got.header.Get("Location") == want,
			"the login after GET %s: %d to %q, want %q", page, got.status, got.header.Get("Location"), want)
		got = c.do("POST", "/login", form("user", "Ada", "password", "blue whale"))
		same(t, got.header.Get("Location"), "/", "the next login after GET %s leads to", page)
	}
	for _, value := range []string{"//evil.example", "https%3A%2F%2Fevil.example", "%2Flogout", "%zz"} {
		c := newClient(t, room.url)
		got := c.do("POST", "/login", form("user", "Ada", "password", "blue whale"), "Cookie: "+nextName+"="+value)
		same(t, got.header.Get("Location"), "/", "a login with the cookie %s leads to", value)
	}
}

// Without script a page says that it needs one, and offers nothing that half works.
func TestPageWithoutScript(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	url := startRoom(t).url
	b.login(url, "小明")
	b.cdp("Emulation.setScriptExecutionDisabled", map[string]any{"value": true})
	for _, page := range []string{"/", "/lesson", "/?view=projector"} {
		b.open(url + page)
		b.checks(
			check{page + " says so", "(n => n && n.getBoundingClientRect().height > 10 && /JavaScript/.test(n.textContent))(document.querySelector('noscript p'))"},
			check{page + " offers nothing that sends, or that needs script", "[...document.querySelectorAll('textarea, input, button, nav a')].filter((n) => n.getBoundingClientRect().height).map((n) => n.textContent).join() === '" + map[bool]string{true: "Log out"}[page == "/"] + "'"},
			check{page + " claims no state", "!document.querySelector('#status').getBoundingClientRect().height"},
		)
	}
}

// The smallest screens and the largest.
func TestPageSizes(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	for i := range 30 {
		p.send(frame(id(), fmt.Sprintf("[10:00:00] Ada: line %d", i)))
	}
	b.hasText("line 29")
	for _, size := range [][2]int{{667, 170}, {320, 256}} {
		b.size(size[0], size[1])
		js[any](b, "$('#text').value = 'one\\ntwo\\nthree\\nfour\\nfive'; $('#text').dispatchEvent(new Event('input'))")
		b.settle()
		b.checks(
			check{fmt.Sprintf("%v: the log shows two lines", size), "$('#log').clientHeight >= 64 && bottom() < 2"},
			check{fmt.Sprintf("%v: Send is whole", size), "(r => r.top >= 0 && r.bottom <= innerHeight && r.right <= innerWidth && r.height >= 44)($('#send').getBoundingClientRect())"},
			check{fmt.Sprintf("%v: so is what is written, two lines at a time", size), "$('#text').clientHeight >= 60 && document.scrollingElement.scrollHeight <= innerHeight"},
		)
	}
	b.size(1280, 800)
	js[any](b, "$('#text').value = ''; $('#text').dispatchEvent(new Event('input'))")

	// The reader's own size of type.
	const sizes = "return ['#log .text', '.who bdi', '#text', 'h1', '#send', '#status', 'nav a'].map((css) => parseFloat(getComputedStyle($(css)).fontSize))"
	before := js[[]float64](b, sizes)
	js[any](b, "document.documentElement.style.fontSize = '150%'")
	for i, after := range js[[]float64](b, sizes) {
		expect(t, math.Abs(after-1.5*before[i]) <= .01, "with type half again as large text %d is %v px instead of %v", i, after, 1.5*before[i])
	}

	// What an extension puts beside the field.
	const places = "return JSON.stringify(['#text', '#send', '#log'].map((css) => $(css).getBoundingClientRect()))"
	js[any](b, "document.documentElement.style.fontSize = ''")
	b.settle()
	place := js[string](b, places)
	js[any](b, "const n = document.createElement('grammar-helper'); n.style.cssText = 'display: block; width: 60px; height: 90px'; $('#text').after(n)")
	b.settle()
	same(t, js[string](b, places), place, "a node beside the field moves things from")

	// On a wall: as large in the hall, whatever the projector's pixels.
	b.enter(p.url() + "/?view=projector")
	p.send(frame(id(), "[10:00:00] Ada: "+strings.Repeat("to be read from the last row ", 9)))
	b.wait("a text", "texts().at(-1)?.startsWith('to be read')")
	letters := map[int]float64{}
	for _, width := range []int{1920, 3840} {
		b.size(width, width*9/16)
		b.settle()
		letters[width] = js[float64](b, "return parseFloat(getComputedStyle($('#log .text')).fontSize)")
		b.checks(
			check{fmt.Sprintf("%d px: lines of 45 characters' width", width), "(n => { const zeros = document.createElement('span'); zeros.textContent = '0'.repeat(45); n.append(zeros); const w = zeros.getBoundingClientRect().width; zeros.remove(); return n.clientWidth <= w + 1 && n.clientWidth > w - 9; })($('#log .row:last-child .text'))"},
			check{fmt.Sprintf("%d px: the last row keeps clear of the edge", width), "innerHeight - $('#log .row:last-child').getBoundingClientRect().bottom >= 24"},
			check{fmt.Sprintf("%d px: it says what Space does", width), "seen($('.space')) && $('.space').textContent === 'Space pauses'"},
		)
	}
	expect(t, letters[1920] >= 40 && math.Abs(letters[3840]-2*letters[1920]) <= 1, "letters of %v px", letters)
}

// A disc shows the first character that is seen, not half a flag; emoji that stand alone are large.
func TestPageEmoji(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	for _, c := range []struct{ name, initial string }{
		{"🐼 Panda", "🐼"}, {"🇨🇳Chen", "🇨🇳"}, {"👍🏽ok", "👍🏽"}, {"e\u0301mile", "E\u0301"}, {"1\u20e3", "1\u20e3"}, {"ßtefan", "SS"}, {"小红", "小"},
	} {
		p.send(frame(id(), "[10:00:00] "+c.name+": I am "+c.name))
		b.hasText("I am " + c.name)
		if got := js[string](b, "return $('#log .row:last-child .who').dataset.initial"); got != c.initial {
			t.Errorf("the disc of %q has %q, want %q", c.name, got, c.initial)
		}
	}
	for text, large := range map[string]bool{
		"👋": true, "🎉🎉 🎉": true, "👨\u200d👩\u200d👧\u200d👦": true, "🙏🏿": true, "❤\ufe0f": true, "🇨🇳": true,
		"ok 👌": false, "^^": false, "666": false, "好": false, strings.Repeat("😂", 9): false, "`👋`": false, "👋\n👋": false,
	} {
		p.send(frame(id(), "[10:00:00] Ada: "+text))
		js[any](b, "window.size = () => parseFloat(getComputedStyle($('#log .row:last-child .text')).fontSize)")
		b.wait(fmt.Sprintf("%q is large: %v", text, large), "$('#log .row:last-child .text').textContent === arguments[0] && (size() === 32) === arguments[1]", strings.Trim(text, "`"), large)
	}
	b.says("👍")
	b.hasText("👍")
	b.checks(check{"an own one, too, and it has no bubble", "(s => s.fontSize === '32px' && s.backgroundColor === 'rgba(0, 0, 0, 0)')(getComputedStyle(row('👍').querySelector('.text')))"})
}

// Whose message it is, is decided by the keys that this browser has sent, not by a name that
// anybody can take.
func TestPageOwn(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	own := func(text string) string { return fmt.Sprintf("row('%s').classList.contains('own')", text) }
	b.says("mine")
	p.says(b, "小明", "not mine")
	b.checks(check{"a message of this browser is marked, one under the same name is not", own("mine") + " && !" + own("not mine")},
		check{"they do not stand together", "!row('not mine').classList.contains('follows')"})
	js[any](b, "hide(true)")
	p.send(frame(id(), "[10:00:00] 小明: unread"))
	b.checks(check{"it counts as unread", "document.title.startsWith('(1)')"})
	js[any](b, "hide(false)")

	b.open(p.url())
	b.wait("reloaded", "row('mine')")
	b.checks(check{"a reload knows its own", own("mine")})
	b.enter(p.url() + "/lesson")
	b.keys("#message", "from the lesson\uE007")
	b.wait("it is sent", "$('#message').value === ''")
	first := b.tab()
	b.newTab()
	b.open(p.url())
	b.hasText("from the lesson")
	b.checks(check{"so does another tab, also of what the lesson sent", own("mine") + " && " + own("from the lesson")})
	b.toTab(first)
	b.open(p.url())
	b.wait("the room", "row('mine')")
	b.say("from the first tab")
	b.toTab(call[[]string](b, "GET", "/window/handles", nil)[1])
	b.hasText("from the first tab")
	b.checks(check{"and of what is sent while it is open", own("from the first tab")})
	js[any](b, "hide(true)")
	b.toTab(first)
	b.says("from the first tab again")
	b.toTab(call[[]string](b, "GET", "/window/handles", nil)[1])
	js[any](b, "hide(false)")
	b.hasText("from the first tab again")
	b.checks(check{"which does not count as unread", "!$('[data-new]') && document.title === 'Chat room'"})
	b.open(p.url() + "/?view=projector")
	b.hasText("from the first tab")
	b.checks(check{"on a wall nothing is anybody's own", "!$('.own')"})

	b.open(p.url() + "/login")
	b.login(p.url(), "Ada")
	b.checks(check{"another name does not change what this browser has sent", own("mine")})
	b.click("#logout button")
	b.wait("logged out", "location.pathname === '/login'")
	b.login(p.url(), "小明")
	b.hasText("mine")
	b.checks(check{"who comes after a logout is somebody else, even with the same name", "!$('#log .own')"})
}

func TestPageLooks(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	long := strings.Repeat("WordWithoutEnd", 40)
	p.send(frame(id(), "[10:00:00] Ada: "+long))
	p.send(frame(id(), "[10:00:00] 李雷: ```\n"+long+"\n```\nhttps://example.com/"+long+" `"+long+"` plain"))
	p.send(frame(id(), "[10:00:00] "+strings.Repeat("W", 24)+": hello"))
	b.says("my own")
	p.send(frame(id(), "[10:00:00] Ada: "+strings.Repeat("long ", 400)))
	b.wait("a folded text", "$('.folded')")
	p.send(gapAndPing)
	b.hasText("my own")
	b.checks(check{"the time is small", "getComputedStyle(row('hello').querySelector('time')).fontSize === '12px'"})
	b.checks(check{"an own time stands as near to its bubble as a name", "(h => h > 0 && h === row('hello').querySelector('.who').offsetHeight)(row('my own').querySelector('.who').offsetHeight)"})
	b.lightAndDark("chat")
	b.media(map[string]string{"forced-colors": "active"})
	b.colours("forced colours")
	b.checks(
		check{"with forced colours a bubble has a border, an own one another", "((a, b) => parseInt(a.borderTopWidth) >= 1 && a.borderTopColor !== a.backgroundColor && a.borderTopColor !== b.borderTopColor)(...['hello', 'my own'].map((t) => getComputedStyle(row(t).querySelector('.text'))))"},
		check{"nothing fades", "getComputedStyle($('.folded')).webkitMaskImage === 'none'"},
		check{"and the state keeps its dot", "(s => s.backgroundColor !== getComputedStyle($('header')).backgroundColor && parseInt(s.width) >= 8)(getComputedStyle($('#status'), '::before'))"},
	)
	b.media(map[string]string{"prefers-reduced-motion": "reduce"})
	p.set(func() { p.status["/post"] = 400 })
	b.say("failed")
	b.wait("failed", "$('#unsent [data-state=failed]')")
	p.stop()
	b.say("waits")
	b.wait("the banner", "state() === 'reconnecting'")
	b.checks(check{"nothing moves for who wants no motion", "document.getAnimations().length === 0"})
	b.lightAndDark("chat, lost")
	b.widths("chat")
	p.start()
	b.open(p.url() + "/login")
	js[any](b, "document.forms[0].noValidate = true; document.getElementById('user').value = 'a:b'; document.forms[0].submit()")
	b.wait("an error", "$('#error')")
	b.lightAndDark("login")
	b.widths("login")
}

// lightAndDark measures the contrast of what is seen in both.
func (b *browser) lightAndDark(what string) {
	b.t.Helper()
	for _, scheme := range []string{"light", "dark"} {
		b.media(map[string]string{"prefers-color-scheme": scheme})
		b.colours(what + ", " + scheme)
	}
}

// widths looks for what is cut off, too small to touch, or too small to read.
func (b *browser) widths(page string) {
	b.t.Helper()
	for _, w := range []int{320, 360, 390, 768, 1024, 1280} {
		b.size(w, 700)
		b.wait("the size", "innerWidth === arguments[0]", w)
		got := js[[]string](b, `
			const wrong = [];
			if (document.scrollingElement.scrollWidth > innerWidth) wrong.push('the page scrolls sideways');
			const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
			while (walk.nextNode()) {
				const node = walk.currentNode, box = node.parentElement;
				if (!node.data.trim() || !seen(box) || box.closest('template, noscript')) continue;
				const range = document.createRange();
				range.selectNodeContents(node);
				const edge = box.closest('#log, #unsent, form, header, main') ?? document.body;
				if (range.getBoundingClientRect().right > edge.getBoundingClientRect().left + edge.clientWidth + 1
					&& getComputedStyle(box).textOverflow !== 'ellipsis' && !box.closest('.me'))
					wrong.push('cut off: ' + node.data.trim().slice(0, 20));
			}
			for (const node of $$('button, nav a, input, textarea').filter(seen))
				if (node.getBoundingClientRect().height < 43.99) wrong.push('not 44 px but ' + node.getBoundingClientRect().height + ': ' + node.outerHTML.slice(0, 60));
			for (const node of $$('input, textarea, #log .text'))
				if (parseFloat(getComputedStyle(node).fontSize) < 16) wrong.push('under 16 px: ' + node.outerHTML.slice(0, 40));
			for (const node of $$('#log .row')) if (node.clientWidth > 760) wrong.push('a line of ' + node.clientWidth + ' px');
			const last = $('#form') ?? $('form');
			if (last.getBoundingClientRect().bottom > innerHeight) wrong.push('the form is below the screen');
			return wrong;`)
		for _, wrong := range got {
			b.t.Errorf("%s, %d px wide: %s", page, w, wrong)
		}
	}
}

// colours measures the contrast of every text that is seen.
func (b *browser) colours(what string) {
	b.t.Helper()
	got := js[[]string](b, `
		const parse = (c) => { const n = c.match(/[\d.]+/g).map(Number); return { rgb: n.slice(0, 3), a: n[3] ?? 1 }; };
		const luminance = (rgb) => rgb.map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
			.reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
		const ground = (node) => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node).backgroundColor);
			if (c.a === 1) return c.rgb; } return [255, 255, 255]; };
		const wrong = [];
		let least = 99;
		const measure = (name, colour, node) => {
			const [a, b] = [luminance(parse(colour).rgb), luminance(ground(node))].sort((x, y) => y - x);
			const ratio = (a + .05) / (b + .05);
			least = Math.min(least, ratio);
			if (ratio < 4.5) wrong.push(name + ': ' + ratio.toFixed(2));
		};
		const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
		let n = 0;
		while (walk.nextNode()) {
			const box = walk.currentNode.parentElement;
			if (!walk.currentNode.data.trim() || !seen(box) || box.closest('button:disabled')) continue;
			n++;
			measure(walk.currentNode.data.trim().slice(0, 20), getComputedStyle(box).color, box);
		}
		for (const node of $$('[placeholder]')) measure('placeholder', getComputedStyle(node, '::placeholder').color, node);
		if (n < 4) wrong.push('only ' + n + ' texts');
		return wrong;`)
	for _, wrong := range got {
		b.t.Errorf("%s: contrast of %s", what, wrong)
	}
}

func TestPageStructure(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		lang, html string
		list       []check
	}{
		{"zh-CN,en", "zh", []check{
			{"texts in Chinese", "document.title === '聊天室' && $('#text').placeholder === '输入消息' && $('#send').textContent === '发送' && $('#status').textContent === '已连接'"},
		}},
		{"en-US,zh", "en", []check{
			{"texts in English", "document.title === 'Chat room' && $('#text').placeholder === 'Write a message' && $('#send').textContent === 'Send' && $('#status').textContent === 'Live'"},
			{"the state is a status", "$('#status').role === 'status' && $('header').contains($('#status'))"},
			{"one log, polite and named", "$$('[role=log]').length === 1 && $('[role=log]').ariaLive === 'polite' && $('[role=log]').ariaLabel"},
			{"the log is the scroller", "getComputedStyle($('#log')).overflowY === 'auto' && $$('*').filter((n) => n.scrollHeight > n.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(n).overflowY)).every((n) => n === $('#log'))"},
			{"the field has a label, one row, a direction of its own", "$('label[for=text]').textContent === 'Message' && $('#text').rows === 1 && $('#text').dir === 'auto' && $('#text').name === 'message'"},
			{"no maxlength, which cuts pastes", "$('#text').maxLength === -1"},
			{"focus goes skip link, header, log, field, Send", "JSON.stringify($$('a, button, textarea, [tabindex]').filter((n) => !n.closest('[hidden]')).map((n) => n.id || n.className || n.textContent)) === JSON.stringify(['skip', 'wide', 'Lesson', 'Log out', 'log', 'text', 'send'])"},
			{"a link to the lesson", "$$('a').some((n) => n.pathname === '/lesson')"},
			{"no script, style or handler in the markup", "!$$('script:not([src]), style, [style]:not(#text), [onclick]').length"},
			{"the viewport is the keyboard's too", "/interactive-widget=resizes-content/.test($('meta[name=viewport]').content)"},
		}},
		{"fr", "en", nil},
	} {
		b, p := visit(t, c.lang)
		same(t, js[string](b, "return document.documentElement.lang"), c.html, "Accept-Language %s: a page in", c.lang)
		b.checks(c.list...)
		if c.lang != "en-US,zh" {
			continue
		}
		js[any](b, "document.activeElement.blur()")
		b.keys("body", "\uE004")
		b.checks(check{"the skip link is seen when it has the focus", "document.activeElement.matches('.skip') && $('.skip').getBoundingClientRect().width > 60 && getComputedStyle($('.skip')).clipPath === 'none'"})
		b.checks(check{"and is 44 px high", "$('.skip').getBoundingClientRect().height >= 44"})

		b.open(p.url() + "/login")
		b.checks(
			check{"the last name is filled in", "$('#user').value === '小明'"},
			check{"the field is labelled, required and has the focus", "$('label[for=user]').textContent === 'Your name' && $('#user').required && document.activeElement === $('#user')"},
			check{"a name is not a word", "$('#user').autocomplete === 'nickname' && $('#user').getAttribute('autocapitalize') === 'off' && $('#user').getAttribute('spellcheck') === 'false' && $('#user').enterKeyHint === 'go'"},
			check{"no script on the login page", "!$('script')"},
		)
		js[any](b, "$('#user').value = 'a:b'")
		b.keys("#user", "\uE007")
		b.checks(check{"a bad name is kept, and the reason said", "$('#user').value === 'a:b' && $('[role=alert]').textContent === \"U+003A ':' cannot be used in this name.\" && $('#user').getAttribute('aria-describedby') === $('[role=alert]').id && $('#user').ariaInvalid === 'true'"})
		js[any](b, "$('#user').value = '<b>\"&'; $('#user').form.submit()")
		b.checks(check{"a name is text", "$('.me') && $('.me').textContent === '<b>\"&' && document.body.dataset.name === '<b>\"&'"})
	}
}

func TestPageProjector(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.size(1920, 1080)
	b.enter(p.url() + "/?view=projector")
	send := func(n int, text string) {
		for i := range n {
			p.send(frame(id(), fmt.Sprintf("[10:00:00] Ada: %s %d", text, i)))
		}
		b.hasText(fmt.Sprintf("%s %d", text, n-1))
	}
	send(40, "a line")
	b.checks(
		check{"no composer", "!$('textarea') && !$('#form')"},
		check{"the room's address, at least 56 px", "/^http/.test($('.address b').textContent) && parseFloat(getComputedStyle($('.address b')).fontSize) >= 56"},
		check{"big type", "parseFloat(getComputedStyle($('#log .text')).fontSize) >= 28"},
		check{"the whole width", "$('#log .row').clientWidth > 1500"},
		check{"the end in sight", "bottom() < 2"},
	)
	js[any](b, "$('#log').scrollTop = 100")
	send(1, "after scrolling")
	b.checks(check{"always at the end", "bottom() < 2"})
	b.keys("body", " ")
	send(5, "while paused")
	b.checks(check{"Space pauses", "bottom() > 100 && $('#pill').textContent === 'Paused. Press Space to go on. 5 new messages'"})
	b.keys("body", " ")
	b.checks(check{"Space goes on", "bottom() < 2 && !seen($('#pill'))"})
	b.size(1280, 720)
	p.send(frame(id(), "[10:00:00] Ada: ```go\nx\n```"))
	b.checks(check{"code stands out from the wall", "(n => n && getComputedStyle(n).backgroundColor !== getComputedStyle(document.documentElement).backgroundColor)($('pre'))"})
	b.checks(check{"the language of code can be read from the last row too", "$('pre') && parseFloat(getComputedStyle($('pre'), '::before').fontSize) >= 20"})
	b.checks(check{"at 1280 px too", "parseFloat(getComputedStyle($('#log .text')).fontSize) >= 28 && document.scrollingElement.scrollWidth <= innerWidth && bottom() < 2"})
	p.send(frame(id(), "[10:00:00] Ada: "+strings.Repeat("long ", 400)))
	b.checks(check{"a long text is folded, and nobody is there to unfold it", "$('#log .folded') && $('#log .folded').offsetHeight < innerHeight && !$('.more') && !$('.copy')"})
	b.checks(check{"it fades, so that it is seen to go on", "/gradient/.test(getComputedStyle($('#log .folded')).webkitMaskImage)"})
	p.stop()
	b.wait("the banner", "state() === 'reconnecting'")
	b.checks(check{"nobody is told to go on writing", "$('#status').textContent === 'Connecting…'"})
}

func TestPageClean(t *testing.T) {
	t.Parallel()
	b, p := visit(t)
	b.say("a whole visit https://example.com/ `code`")
	b.hasText("a whole visit https://example.com/ code")
	js[any](b, "hide(true)")
	p.send(frame(id(), "[10:00:00] Ada: unread"))
	b.wait("unread", "document.title.startsWith('(1)')")
	js[any](b, "hide(false)")
	b.enter(p.url() + "/?view=projector")
	b.enter(p.url())
	b.click("#logout button")
	b.wait("logged out", "location.pathname === '/login'")

	type entry struct{ Level, Message string }
	for _, e := range call[[]entry](b, "POST", "/se/log", map[string]any{"type": "browser"}) {
		t.Errorf("the console says: %s %s", e.Level, e.Message)
	}
	origin := regexp.MustCompile(`"url":"([a-z]+:[^"]*)"`)
	asked := 0
	for _, e := range call[[]entry](b, "POST", "/se/log", map[string]any{"type": "performance"}) {
		if !strings.Contains(e.Message, `"Network.requestWillBeSent"`) ||
			strings.Contains(e.Message, `"documentURL":"chrome:`) { // the tab the browser starts with
			continue
		}
		asked++
		for _, m := range origin.FindAllStringSubmatch(e.Message, -1) {
			expect(t, strings.HasPrefix(m[1], p.url()), "a request to %s", m[1])
		}
	}
	expect(t, asked >= 10, "only %d requests were seen", asked)

	// The size of the page: HTML, style and scripts as they come from the server.
	c, total := newClient(t, p.target).login("Ada"), 0
	for _, path := range []string{"/", "/assets/chat.css", "/assets/chat.js", "/assets/stream.js", "/assets/outbox.js", "/assets/text.js", "/assets/keys.js"} {
		got := c.get(path)
		same(t, got.status, 200, "GET %s", path)
		total += len(got.body)
	}
	t.Logf("HTML, CSS and JS of the chat page: %d bytes", total)
	expect(t, total <= 75_000, "HTML, CSS and JS of the chat page: %d bytes", total)
}

// The oldest browsers that README promises. What they lack is not used, or has something else to
// stand on. (The versions are those of MDN's compatibility data.)
func TestPageFloor(t *testing.T) {
	t.Parallel()
	floor := []float64{86, 78, 15.4} // Chromium, Firefox, Safari
	readme := readFile(t, "README.md")
	want := fmt.Sprintf("Chromium %v, Firefox %v, Safari %v", floor[0], floor[1], floor[2])
	expect(t, strings.Contains(readme, want), "README.md does not promise %s", want)
	var style, script string
	for _, kind := range []struct {
		ext  string
		text *string
	}{{"css", &style}, {"js", &script}} {
		names, _ := filepath.Glob("assets/*." + kind.ext)
		for _, name := range names {
			*kind.text += regexp.MustCompile(`(?s)/\*.*?\*/`).ReplaceAllString(readFile(t, name), "")
		}
	}
	for _, f := range []struct {
		name, in, uses string
		since          []float64
		instead        string // what an older browser does with, if that is there
	}{
		{"??", script, `\?\? `, []float64{80, 72, 13.1}, ""},
		{"?.", script, `\?\.\w`, []float64{80, 74, 13.1}, ""},
		{"??= and ||=", script, `\?\?=|\|\|=|&&=`, []float64{85, 79, 14}, ""},
		{"Array.at", script, `\.at\(`, []float64{92, 90, 15.4}, ""},
		{"findLast, toSorted and their like", script, `\.(findLast|toSorted|toReversed|toSpliced|group)\w*\(`, []float64{97, 104, 15.4}, ""},
		{"replaceAll", script, `\.replaceAll\(`, []float64{85, 77, 13.1}, ""},
		{"Object.hasOwn, structuredClone", script, `hasOwn\(|structuredClone`, []float64{93, 92, 15.4}, ""},
		{"private members", script, `this\.#`, []float64{84, 90, 15}, ""},
		{"fields of classes", script, `(?m)^  \w+ = .*;`, []float64{72, 69, 14.1}, ""},
		{"static blocks", script, `static \{`, []float64{94, 93, 16.4}, ""},
		{"await outside of functions", script, `(?m)^(const .*= )?await `, []float64{89, 89, 15}, ""},
		{"looking back in a pattern", script, `\(\?<[=!]`, []float64{62, 78, 16.4}, ""},
		{"classes of characters in a pattern", script, `\\p\{`, []float64{64, 78, 11.1}, ""},
		{"flags d and v of a pattern", script, `/[gimsuy]*[dv][gimsuy]*[;,)]`, []float64{112, 116, 17}, ""},
		{"replaceChildren", script, `replaceChildren`, []float64{86, 78, 14}, ""},
		{"crypto.randomUUID", script, `\.randomUUID\(`, []float64{92, 95, 15.4}, ""},
		{"AbortSignal.timeout", script, `AbortSignal\.`, []float64{103, 100, 16}, ""},
		{"navigator.clipboard", script, `navigator\.clipboard`, []float64{66, 127, 13.1}, `execCommand\('copy'\)`},
		{"shared workers", script, `new SharedWorker`, []float64{80, 114, 16}, `catch \{ +// no such thing here`},
		{"trusted types", script, `trustedTypes`, []float64{83, 148, 26}, `trustedTypes\?\.`},
		{":is() and :where()", style, `:(is|where)\(`, []float64{88, 78, 14}, ""},
		{":has()", style, `:has\(`, []float64{105, 121, 15.4}, ""},
		{"inset", style, `\binset:`, []float64{87, 66, 14.1}, ""},
		{"aspect-ratio", style, `aspect-ratio`, []float64{88, 89, 15}, ""},
		{"overflow: clip", style, `overflow: clip`, []float64{90, 81, 16}, `overflow: hidden;\s+overflow: clip`},
		{"color-mix", style, `color-mix\(`, []float64{111, 113, 16.2}, `background: var\(--line\); background: color-mix`},
		{"dvh", style, `\ddvh`, []float64{108, 101, 15.4}, `height: 100vh;\s+(min-)?height: 100dvh`},
		{"field-sizing", style, `field-sizing`, []float64{123, 152, 26.2}, `@supports \(field-sizing: content\)`},
		{"scrollbar-color", style, `scrollbar-color`, []float64{121, 64, 26.2}, `color-scheme: light dark;\s+scrollbar-color`},
		{"nesting", style, `(?m)^\s*&`, []float64{112, 117, 16.5}, ""},
		{"layers and containers", style, `@(layer|container)`, []float64{99, 97, 15.4}, ""},
		{"lh", style, `\d(r?lh)\b`, []float64{109, 120, 16.4}, ""},
		{"translate, rotate and scale alone", style, `(?m)[{;]\s*(translate|rotate|scale):`, []float64{104, 72, 14.1}, ""},
		{"overflow-wrap: anywhere", style, `overflow-wrap: anywhere`, []float64{80, 65, 15.4}, ""},
		{"min(), max() and clamp()", style, `\b(min|max|clamp)\(`, []float64{79, 75, 13.1}, ""},
		{"gap of flex boxes", style, `\bgap:`, []float64{84, 63, 14.1}, ""},
		{"logical shorthands", style, `\b(margin|padding|inset)-(inline|block):`, []float64{87, 66, 14.1}, ""},
	} {
		if !regexp.MustCompile(f.uses).MatchString(f.in) {
			continue
		}
		if f.instead != "" && regexp.MustCompile(f.instead).MatchString(f.in+script) {
			continue
		}
		for i, since := range f.since {
			expect(t, since <= floor[i],
				"%s: %s has it since %v, and is promised from %v", f.name, []string{"Chromium", "Firefox", "Safari"}[i], since, floor[i])
		}
	}
}

// Every text is there in both languages, is used, and is what the templates and the scripts ask for.
func TestPageStrings(t *testing.T) {
	t.Parallel()
	texts := newTestServer(t, &config{}, t.Logf).texts
	asks, blank := regexp.MustCompile(`(?:\bT\.|say\(')([a-z_]+)`), regexp.MustCompile(`{\w}`)
	used := []string{"connecting", "live", "reconnecting", "offline", // T[state]
		"name_empty", "name_long", "name_chars", "password_wrong", "too_many"} // .Error
	for _, name := range []string{"chat", "lesson", "login"} {
		page, script := readFile(t, "assets/"+name+".html"), ""
		if name != "login" {
			script = readFile(t, "assets/"+name+".js")
		}
		for _, key := range allMatches(asks, script) {
			expect(t, strings.Contains(page, `data-key="`+key+`">{{.T.`+key+`}}<`), "%s.js asks for %s, which its page does not give it", name, key)
		}
		used = append(used, allMatches(asks, page+script)...)
	}
	slices.Sort(used)
	for lang, other := range map[string]string{"en": "zh", "zh": "en"} {
		same(t, slices.Sorted(maps.Keys(texts[lang])), slices.Compact(slices.Clone(used)), "texts in %s, and what is used", lang)
		for key, text := range texts[lang] {
			expect(t, strings.TrimSpace(text) != "", "%s lacks %q", lang, key)
			same(t, blank.FindAllString(text, -1), blank.FindAllString(texts[other][key], -1), "the blanks of %s in %s and %s", key, lang, other)
		}
	}
}

// lessonScript is what the scripts of these tests call: a column's numbers as they are seen.
const lessonScript = `
	window.way = (name) => document.querySelector('[data-way="' + name + '"]');
	window.cell = (name, what) => way(name).querySelector('dd.' + what).textContent;
	window.num = (name, what) => Number(cell(name, what).replaceAll(',', '') || NaN);
	window.ways = ['polling', 'long', 'sse', 'ws'];
	window.each = (what) => ways.map((name) => num(name, what));
	window.lines = (name) => [...way(name).querySelectorAll('.newest li')].map((n) => n.textContent.slice(11));
	window.raw = (id) => [...document.querySelectorAll(id + ' > li')].map((n) => n.textContent);
`

// openLesson opens the lesson of a room, and waits until all four columns receive.
func openLesson(t *testing.T, url string, language ...string) *browser {
	t.Helper()
	b := startBrowser(t, language...)
	b.inject(lessonScript)
	b.enter(url + "/lesson")
	b.wait("all four receive", "state() === 'live'")
	return b
}

// lessonKey is an id of 32 characters, as long as those the page draws.
func lessonKey(n int) string { return fmt.Sprintf("lesson-message-%017d", n) }

// lessonOpens counts the requests for /stream that came through, apart from those the page makes by hand.
func (p *pageRelay) lessonOpens(wait string) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, query := range p.opened {
		if v, _ := url.ParseQuery(query); v.Has("after") && v.Get("wait") == wait {
			n++
		}
	}
	return n
}

func TestLessonCounts(t *testing.T) {
	t.Parallel()
	room := startRoom(t)
	person := newClient(t, room.url)
	first := person.sayAs(lessonKey(0), "before the lesson")
	b := openLesson(t, strings.Replace(room.url, "127.0.0.1", "chat.test", 1))
	begun := time.Now()
	twin := &counter{}
	twin.open(t, person, "/stream?after="+first)
	b.checks(check{"no number before there is one", "ways.every((name) => cell(name, 'delay') === '')"},
		check{"the lesson begins at the newest message", "each('messages').join() === '0,0,0,0'"})
	person.postKey(lessonKey(1), "from the room")
	b.keys("#message", "from the lesson\uE007")
	b.wait("both are in all four columns", "each('messages').join() === '2,2,2,2'")
	b.checks(
		check{"the same two in each", "ways.every((name) => lines(name).join() === 'anonymous: from the lesson,anonymous: from the room')"},
		check{"the delay of the one that was sent here", "ways.every((name) => /^[\\d.]+ m?s$/.test(cell(name, 'delay')) && way(name).querySelectorAll('.delays i').length === 1)"},
		check{"the field is empty again", "$('#message').value === ''"},
		check{"the line of the post crosses all four", "ways.every((name) => way(name).querySelectorAll('.strip .post').length === 1)"},
		check{"a dot for each message", "ways.every((name) => way(name).querySelectorAll('.strip .dot').length === 2)"},
	)

	time.Sleep(10*time.Second - time.Since(begun))
	got := js[[]int](b, "return each('requests')")
	if got[0] < 4 || got[0] > 7 || got[1] < 2 || got[1] > 4 || got[2] != 1 || got[3] != 1 {
		t.Errorf("after 10 s polling, long polling, SSE and WebSocket made %v requests, want 4 to 7, 2 to 4, 1, and 1", got)
	}
	b.checks(check{"as many bars", "ways.every((name) => way(name).querySelectorAll('.strip .bar').length === num(name, 'requests'))"},
		check{"polling's are mostly empty", "way('polling').querySelectorAll('[data-state=empty]').length >= 2"},
		check{"and its others are full", "[1, 2].includes(way('polling').querySelectorAll('[data-state=full]').length)"},
		check{"those of SSE are one", "way('sse').querySelectorAll('.bar').length === 1 && way('sse').querySelector('.bar').getBoundingClientRect().width > 100"})

	head, body := twin.read()
	b.checks(check{"the header's size", fmt.Sprintf("Number($('#head').textContent) === %d", head)})
	if got := js[int](b, "return num('sse', 'bytes')"); got != head+body {
		t.Errorf("SSE received %d bytes by the page's count, %d by ours", got, head+body)
	}
	// The same events in frames: three of them, each with a head of two bytes, behind another header.
	handshake, conn := 0, dial(t, room.url)
	io.WriteString(conn, shake("/ws"))
	for line, in := "", bufio.NewReader(conn); line != "\r\n"; handshake += len(line) {
		var err error
		if line, err = in.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := js[int](b, "return num('ws', 'bytes')"), handshake+body+3*2; got != want {
		t.Errorf("the WebSocket received %d bytes by the page's count, %d by ours", got, want)
	}
	empty := len("retry: 2000\n") + len(pingAt(first))
	messages := body - empty // the rest of the twin's: the same two messages
	b.wait("polling's bytes are exact", "num('polling', 'bytes') === num('polling', 'requests') * arguments[0] + arguments[1]", head+empty, messages)

	b.click("#freeze")
	person.postKey(lessonKey(2), "while frozen")
	time.Sleep(300 * time.Millisecond) // the time line glides
	js[any](b, "frozenAt = num('polling', 'requests'); frozenBar = way('sse').querySelector('.bar').getBoundingClientRect().left")
	time.Sleep(2500 * time.Millisecond)
	b.checks(check{"Freeze holds the picture", "num('polling', 'requests') === frozenAt && way('sse').querySelector('.bar').getBoundingClientRect().left === frozenBar && !raw('#answer').join().includes('while frozen') && $('#freeze').ariaPressed === 'true'"})
	b.click("#freeze")
	b.checks(check{"and lets it go on", "num('polling', 'requests') > frozenAt && raw('#answer').join().includes('while frozen')"})
	// Requests that have left the time line still count. (Right after one, so that no other comes.)
	b.wait("another poll", "num('polling', 'requests') > arguments[0]", js[int](b, "return num('polling', 'requests')"))
	time.Sleep(200 * time.Millisecond) // until it has been measured
	left := js[[]int](b, `return (async () => {
		const seen = () => [num('polling', 'requests'), num('polling', 'bytes')];
		const before = seen(), clock = performance.now;
		performance.now = () => clock.call(performance) + 35_000;
		await new Promise((done) => setTimeout(done, 300));
		const after = seen(), bars = way('polling').querySelectorAll('.bar').length;
		performance.now = clock;
		return [after[0] - before[0], after[1] - before[1], Math.sign(before[0] - bars)];
	})()`)
	expect(t, slices.Equal(left, []int{0, 0, 1}),
		"35 s later polling has %d more requests, %d more bytes, and fewer bars %d; want 0, 0, 1", left[0], left[1], left[2])
	// A browser keeps 250 entries at most, unless they are thrown away.
	b.checks(check{"read entries are thrown away", "performance.getEntriesByType('resource').length < 3"})
}

// A gap has an id, and so has the ping after it; the lesson counts these too. After a gap the history
// comes again.
func TestLessonCountsAGap(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	room := redis.room()
	newClient(t, room.url).postKey(lessonKey(0), "before the lesson")
	b := openLesson(t, strings.Replace(room.url, "127.0.0.1", "chat.test", 1))
	told := js[int](b, "return num('sse', 'bytes')")
	before, ok := redis.do("RPOP", "chat:history").([]byte)
	require(t, ok, "the list is empty")
	id, line, _ := strings.Cut(string(before), " ")
	elsewhere := entry{lessonKey(1) + "~aaaaaaaa", "[12:00:00] 小明: elsewhere"}
	redis.do("RPUSH", "chat:history", elsewhere.id+" "+elsewhere.line)
	redis.do("CLIENT", "KILL", "TYPE", "pubsub")
	eventually(t, "the list to be written", func() bool { return len(redis.history()) == 3 })
	gap, _, _ := strings.Cut(redis.history()[2], " ")
	told += 2*len(encode(elsewhere)) + len(encode(entry{id, line})) + len(encode(entry{gap, gapLine})) + len(pingAt(gap))
	b.wait("what comes after the gap", "num('sse', 'messages') === 3 && num('sse', 'bytes') >= arguments[0]", told)
	more := js[int](b, "return num('sse', 'bytes')") - told
	expect(t, more%len(pingFrame) == 0 && more <= 3*len(pingFrame),
		"SSE received %d bytes more than the messages, the gap and the ping, want pings of %d, at most three", more, len(pingFrame))
}

// Firefox often measures that a stream which the page broke off ended where it began. Its bar stays
// as long as it was.
func TestLessonBarThatWasBrokenOff(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	b.inject(lessonScript + `
		window.cut = 0; // times that the end of SSE was read
		Object.defineProperty(PerformanceResourceTiming.prototype, 'responseEnd', { get() {
			if (new URL(this.name).pathname === '/stream' && !this.name.includes('wait=')) window.cut++;
			return this.responseStart;
		} });
		window.barWidth = () => way('sse').querySelector('.bar').getBoundingClientRect().width;`)
	b.open(strings.Replace(startRoom(t).url, "127.0.0.1", "chat.test", 1) + "/lesson")
	b.wait("a bar of a second and more", "state() === 'live' && barWidth() > 30")
	b.click("#break")
	b.wait("the browser to have measured it", "cut > 0")
	js[any](b, "return new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
	b.checks(check{"the bar is as long as it was", "barWidth() > 30"})
}

// A counter counts the bytes of an answer as they come, its header and its body.
type counter struct {
	mu         sync.Mutex
	head, body int
}

func (c *counter) open(t *testing.T, person *client, target string) {
	t.Helper()
	conn := dial(t, person.url)
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, conn.RemoteAddr())
	go func() {
		in, ended := bufio.NewReader(conn), false
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			c.mu.Lock()
			if ended {
				c.body += len(line)
			} else {
				c.head += len(line)
			}
			c.mu.Unlock()
			ended = ended || line == "\r\n"
		}
	}()
}

func (c *counter) read() (head, body int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.head, c.body
}

func TestLessonLosesNothing(t *testing.T) {
	t.Parallel()
	room := startRoom(t)
	person := newClient(t, room.url).login("Ada")
	person.postKey(lessonKey(0), "first")
	p := startPageRelay(t, room.url)
	b := openLesson(t, p.url())
	one := person.sayAs(lessonKey(1), "one")
	b.wait("one", "each('messages').join() === '1,1,1,1'")

	// The button.
	b.click("#break")
	b.wait("broken", "state() === 'broken' && $('#break').textContent === 'Connect again'")
	p.lessonCloses("Break")
	before := p.lessonOpens("0") + p.lessonOpens("25s") + p.lessonOpens("")
	two := person.sayAs(lessonKey(2), "two")
	b.keys("#message", "three\uE007")
	b.wait("three is sent", "$('#message').value === ''")
	four := person.sayAs(lessonKey(4), "four\nand its second line")
	time.Sleep(2500 * time.Millisecond)
	if after := p.lessonOpens("0") + p.lessonOpens("25s") + p.lessonOpens(""); after != before {
		t.Errorf("%d requests while the connections are broken", after-before)
	}
	b.checks(check{"nothing comes meanwhile", "each('messages').join() === '1,1,1,1'"})
	b.click("#break")
	b.wait("what was missed", "each('messages').join() === '4,4,4,4'")
	time.Sleep(1500 * time.Millisecond) // a second look at the wire would have come by now
	b.checks(
		check{"in its order", `ways.every((name) => lines(name).join('|') === 'Ada: four\nand its second line|anonymous: three|Ada: two')`},
		check{"its delay is the break's", "ways.every((name) => parseFloat(cell(name, 'delay')) > 2 && cell(name, 'delay').endsWith(' s'))"},
		check{"the wire shows what the browser came with", fmt.Sprintf("raw('#request').includes('Last-Event-ID: %s')", one)},
		check{"and what it got", fmt.Sprintf("raw('#answer').join('\\n').includes('data: four\\n') || /id: %s\\ndata: \\[.*\\] Ada: two\\n\\nid: \\w{32}~[a-z2-7]{8}\\ndata: .* anonymous: three\\n\\nid: %s\\ndata: .* Ada: four\\ndata: and its second line\\n\\nevent: ping\\nid: %s\\ndata:\\n$/.test(raw('#answer').join('\\n'))", two, four, four)},
		check{"the commands of the newest", fmt.Sprintf(`$('#entry').textContent === '"%s ' + $('#line').textContent.slice(1) && $('#id').textContent === '%s' && $('#line').textContent.endsWith('Ada: four\\xe2\\x80\\xa8and its second line"')`, four, four)},
	)

	// Each kind of line has its explanation, by focus and by mouse.
	for line, words := range map[string]string{"Last-Event-ID:": "id of the last event", "retry:": "come back in so many", "id:": "names it when it comes back",
		"data: [": "The message itself", "data:": "has to be there", "event: ping": "up to date"} {
		js[any](b, `const all = $$('.raw > li');
			(all.find((n) => n.textContent === arguments[0]) ?? all.find((n) => n.textContent.startsWith(arguments[0]))).focus()`, line)
		b.checks(check{"what " + line + " is for", fmt.Sprintf("$('#why').textContent.includes('%s') && document.activeElement.matches('.raw > li')", words)})
	}
	js[any](b, "$$('#answer > li').at(-1).dispatchEvent(new MouseEvent('mouseover', { bubbles: true }))")
	b.checks(check{"what a blank line is for", "$('#why').textContent.includes('ends the event')"})

	// A tab that is not seen.
	js[any](b, "hide(true)")
	p.lessonCloses("hiding")
	before = p.lessonOpens("0") + p.lessonOpens("25s") + p.lessonOpens("")
	person.postKey(lessonKey(5), "five")
	time.Sleep(2500 * time.Millisecond)
	same(t, p.lessonOpens("0")+p.lessonOpens("25s")+p.lessonOpens(""), before, "requests since the tab is hidden, and before")
	js[any](b, "hide(false)")
	b.wait("it comes back", "each('messages').join() === '5,5,5,5'")

	// A server that refuses: an EventSource gives up for good, the page does not.
	came := []int{p.lessonOpens("0"), p.lessonOpens("25s"), p.lessonOpens("")}
	p.set(func() { p.status["/stream"], p.status["/ws"] = 503, 503 })
	p.restart()
	eventually(t, "all three to be refused", func() bool {
		return p.lessonOpens("0") > came[0] && p.lessonOpens("25s") > came[1] && p.lessonOpens("") > came[2]
	})
	b.wait("the loss is shown", "state() === 'reconnecting'")
	person.postKey(lessonKey(6), "six")
	p.set(func() { clear(p.status) })
	b.wait("all four come back", "each('messages').join() === '6,6,6,6' && state() === 'live'")

	// Refused posts keep their text, and come once.
	p.set(func() { p.status["/post"] = 429 })
	b.keys("#message", "seven\uE007")
	b.checks(check{"too fast", "$('#notice').textContent === 'Too fast. Wait 1 s.' && $('#message').value === 'seven'"})
	p.set(func() { p.status["/post"] = 0; p.swallow = true })
	b.keys("#message", "\uE007")
	b.checks(check{"no answer", "$('#notice').textContent.startsWith('Not sure') && $('#message').value === 'seven'"})
	p.set(func() { p.swallow = false })
	b.keys("#message", "\uE007")
	b.wait("it is in the room once", "$('#message').value === '' && $('#notice').textContent === '' && each('messages').join() === '7,7,7,7'")
	if tries, messages := p.posts(); tries < 4 || messages != 2 { // the browser may have retried, too
		t.Errorf("%d tries of %d messages, want 4 or more of 2", tries, messages)
	}
	p.set(func() { p.status["/post"] = 401 })
	b.keys("#message", "eight\uE007")
	b.wait("who has no session is asked for a name", "location.pathname === '/login'")
}

// lessonCloses waits until nobody reads a stream.
func (p *pageRelay) lessonCloses(after string) {
	p.t.Helper()
	p.until("the streams are closed after "+after, func() bool { return len(p.streams) == 0 })
}

func TestLessonLooks(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	for _, c := range []struct {
		lang, title, button string
		args                []string
		behind              string
	}{
		{"en", "Four ways to receive", "Break connections", nil, "in its memory"},
		{"zh", "接收消息的四种方式", "断开连接", []string{"-redis", redis.addr, "-channel", "class:5"}, "通过 Redis 共享"},
	} {
		room := startRoom(t, c.args...).joined()
		b := openLesson(t, strings.Replace(room.url, "127.0.0.1", "chat.test", 1), c.lang)
		newClient(t, room.url).login("小明").say("你好 hello")
		b.keys("#message", strings.Repeat("a long message ", 20)+"\uE007")
		b.wait("messages", "each('messages').join() === '2,2,2,2' && raw('#answer').some((line) => line.includes('a long message'))")
		channel := "chat"
		if c.args != nil {
			channel = "class:5"
		}
		b.checks(
			check{c.lang, fmt.Sprintf("document.documentElement.lang === '%s' && document.title === '%s' && $('h1').textContent === '%s' && $('#break').textContent === '%s'", c.lang, c.title, c.title, c.button)},
			check{"which process, and where the room is", fmt.Sprintf("$('main').innerText.includes('process ') && $('main').innerText.includes('%s')", c.behind)},
			check{"the commands of one post", fmt.Sprintf(`$('#entry').parentNode.innerText === 'MULTI\nRPUSH %[1]s:history ' + $('#entry').textContent + '\nLTRIM %[1]s:history -4608 -1\nPUBLISH %[1]s:id ' + $('#id').textContent + '\nPUBLISH %[1]s ' + $('#line').textContent + '\nEXEC'`, channel)},
			check{"lines to type", fmt.Sprintf("$$('pre').some((n) => n.textContent === 'redis-cli SUBSCRIBE %[1]s') && $$('pre').some((n) => n.textContent === 'redis-cli PUBLISH %[1]s hi')", channel)},
			check{"a way back to the room", "$('header a').pathname === '/' && seen($('header a'))"},
		)
		b.lightAndDark("lesson, " + c.lang)
		for _, size := range [][2]int{{1920, 1080}, {1366, 768}, {1280, 720}, {1024, 768}, {390, 844}, {320, 568}} {
			b.size(size[0], size[1])
			for _, wrong := range js[[]string](b, `const wrong = [];
				if (document.scrollingElement.scrollWidth > document.documentElement.clientWidth) wrong.push('scrolls sideways');
				for (const n of $$('a:not(.skip), button, input:not([type=radio]), fieldset label')) if (seen(n) && n.getBoundingClientRect().height < 44) wrong.push('under 44 px: ' + n.outerHTML.slice(0, 60));
				for (const n of $$('main *, header *')) if (seen(n) && !n.closest('.strip, .newest, .unseen') && n.getBoundingClientRect().right > innerWidth + .5) wrong.push('cut off: ' + n.outerHTML.slice(0, 60));
				for (const n of $$('.lane b')) { const text = document.createRange(); text.selectNodeContents(n);
					if (text.getBoundingClientRect().right + 3 > n.nextElementSibling.getBoundingClientRect().left) wrong.push('touches the time line: ' + n.textContent); }
				for (const n of $$('dd, h1, h2, button, .lane b')) if (n.scrollWidth > n.clientWidth + 1) wrong.push('too narrow: ' + n.outerHTML.slice(0, 60));
				return wrong;`) {
				t.Errorf("%s, %d × %d: %s", c.lang, size[0], size[1], wrong)
			}
			columns := js[int](b, "return new Set($$('.card').map((n) => Math.round(n.getBoundingClientRect().left))).size")
			if want := map[bool]int{true: 4, false: 1}[size[0] > 760]; columns != want {
				t.Errorf("%s: %d columns at %d px, want %d", c.lang, columns, size[0], want)
			}
		}
		b.size(1024, 768)
		b.checks(check{"time lines and numbers on one screen", "scrollTo(0, 0), $$('.plot').every((n) => n.getBoundingClientRect().bottom < 768)"})
		b.checks(
			check{"one delay is one", map[string]string{"en": "$$('.spread').every((n) => /^1 delay: /.test(n.textContent))", "zh": "$$('.spread').every((n) => /^1 条：/.test(n.textContent))"}[c.lang]},
			check{"the address to join", "$('header .me b').textContent === location.origin && seen($('header .me'))"},
			check{"what a button shows is in its name", "$('#ten').getAttribute('aria-label').startsWith($('#ten').textContent)"},
			check{"what stands outside main has a name", "$('#say').getAttribute('aria-label')"},
			check{"a mouse is told to point, a finger to touch", "seen($('.by-touch')) === matchMedia('(hover: none)').matches && seen($('.by-mouse')) !== seen($('.by-touch'))"},
		)
		before := js[int](b, "return $('main').offsetHeight")
		newClient(t, room.url).say(strings.Repeat("\n", 1000) + strings.Repeat("界\n", 1400) + "end")
		b.wait("many lines", "raw('#answer').some((line) => line.includes('…')) && $('#line').textContent.endsWith('…\"')")
		after := js[int](b, "return $('main').offsetHeight")
		expect(t, after <= before+700, "thousands of lines make the lesson %d px high instead of %d", after, before)
		b.cdp("Emulation.setEmulatedMedia", map[string]any{"features": []any{}})
		call[any](b, "POST", "/refresh", nil)
		b.wait("all four receive", "state() === 'live' && raw('#answer').length")
		var order []string
		for range 9 {
			b.keys("body", "\uE004")
			order = append(order, js[string](b, "const n = document.activeElement, o = getComputedStyle(n); return (n.id || n.className || n.localName) + (o.outlineStyle !== 'none' && parseFloat(o.outlineWidth) >= 1 ? '' : ' without outline')"))
		}
		if want := []string{"skip", "a", "message", "primary", "ten", "input", "freeze", "break", "li"}; !slices.Equal(order, want) {
			t.Errorf("Tab goes to %q, want %q", order, want)
		}
		type entry struct{ Level, Message string }
		for _, e := range call[[]entry](b, "POST", "/se/log", map[string]any{"type": "browser"}) {
			t.Errorf("the console says: %s %s", e.Level, e.Message)
		}
	}
}

// The frames that are shown are those of the wire, and what is shown of a POST is what came.
func TestLessonFrames(t *testing.T) {
	t.Parallel()
	room := startRoom(t)
	p := startPageRelay(t, room.url)
	b := openLesson(t, p.url())
	twin := newClient(t, room.url).socket("after=0")
	twin.until("(ping)")
	b.checks(check{"nothing is shown before there is something", "!$('#down').children.length && !$('#up').children.length && !$('#posted').children.length"},
		check{"the key and what follows from it", fmt.Sprintf("raw('#ask').includes('Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==') && raw('#grant').includes('Sec-WebSocket-Accept: %s')", readHeader(t, room.url, "Sec-WebSocket-Accept"))})

	for _, c := range []struct{ by, text string }{
		{"[name=by]:not([id])", "hi 你"}, {"#by-socket", "by a frame 你\"'"}, {"#by-socket", strings.Repeat("long ", 50) + "end"},
	} {
		tries, _ := p.posts()
		b.click(c.by)
		b.keys("#message", c.text+"\uE007")
		b.wait("it is sent and shown in all columns", "$('#message').value === '' && ways.every((name) => lines(name)[0] === 'anonymous: ' + arguments[0])", c.text)
		b.wait("and as frames", "raw('#posted').at(-1).startsWith('message=' + new URLSearchParams({ m: arguments[0] }).toString().slice(2).slice(0, 200))", c.text)
		if after, _ := p.posts(); after-tries != map[bool]int{true: 0, false: 1}[c.by == "#by-socket"] {
			t.Errorf("sent with %s: %d requests of POST", c.by, after-tries)
		}
		op, event := twin.frame()
		for ; op == opPing || strings.HasPrefix(event, "event: ping"); op, event = twin.frame() { // of a silence, on a busy machine
			if op == opPing {
				twin.send(masked(0x80|opPong, event))
			}
		}
		want := string(appendFrame(nil, opText, []byte(event)))
		shown := js[[]string](b, "return $$('#down b').map((n) => n.textContent)")
		if more := shown[len(shown)-1] == "…"; more {
			want, shown = want[:len(shown)-1], shown[:len(shown)-1]
		}
		if got := strings.Join(shown, " "); got != fmt.Sprintf("% x", want) {
			t.Errorf("down came\n% x, shown is\n%s", want, got)
		}
		sent := js[[]string](b, "return $$('#up b').filter((n) => n.textContent !== '…').map((n) => n.textContent)")
		var frame []byte
		fmt.Sscanf(strings.Join(sent, ""), "%x", &frame)
		size, head := int(frame[1]&0x7f), 6
		if size == 126 {
			size, head = int(frame[2])<<8|int(frame[3]), 8
		}
		plain := slices.Clone(frame[head:])
		for i := range plain {
			plain[i] ^= frame[head-4+i%4]
		}
		key, _, _ := strings.Cut(strings.TrimPrefix(event, "id: "), "~")
		if want := "id: " + key + "\ndata: " + c.text; frame[0] != 0x81 || frame[1]&0x80 == 0 || size != len(want) || !strings.HasPrefix(want, string(plain)) {
			t.Errorf("the frame of %q, of %d bytes, has the text %q of %d", want, len(want), plain, size)
		}
		b.checks(check{"how many bytes", fmt.Sprintf("$('#up-size').textContent === '%d bytes'", head+size)})
	}
	b.click("[name=by]:not([id])")
	b.keys("#message", "as it came\uE007")
	b.wait("it is in the room", "lines('ws')[0] === 'anonymous: as it came' && raw('#posted').at(-1) === 'message=as+it+came'")
	p.set(func() {
		p.posted.Header.Set("Host", p.posted.Host)
		for _, line := range js[[]string](b, "return raw('#posted').slice(1, -3)") {
			if name, value, _ := strings.Cut(line, ": "); p.posted.Header.Get(name) != value {
				t.Errorf("shown is %q, what came is %q", line, p.posted.Header.Get(name))
			}
		}
	})

	// Every byte and line is explained, by mouse, by keys and by touch.
	for _, id := range []string{"ask", "grant", "down", "up", "posted"} {
		b.checks(check{"each of #" + id + " has its words", fmt.Sprintf(`[...$('#%s').children].every((n) => {
			n.dispatchEvent(new MouseEvent('mouseover', { bubbles: true }));
			return $('#why-frame').textContent.length > 9 && !/[{}]|undefined|NaN/.test($('#why-frame').textContent) && n.getAttribute('aria-describedby') === 'why-frame';
		})`, id)})
	}
	js[any](b, "$('#up').firstElementChild.focus()")
	b.checks(check{"the first byte", "$('#why-frame').textContent.startsWith('81 = 1 000 0001')"})
	b.keys("#up > li", "\uE014\uE014\uE014")
	b.checks(check{"arrow keys go on", "document.activeElement === $('#up').children[3] && $('#why-frame').textContent.includes('byte 2 of the mask')"},
		check{"one byte of a frame is reached by Tab", "$$('#up > [tabindex=\"0\"]').length === 1"})
	b.size(390, 844)
	js[any](b, "$('#grant > li:nth-child(4)').scrollIntoView({ block: 'center' })")
	b.click("#grant > li:nth-child(4)")
	b.checks(check{"a touch explains, and that is in sight", "$('#why-frame').textContent.includes('SHA-1') && (r => r.top >= 0 && r.bottom <= innerHeight)($('#why-frame').getBoundingClientRect())"})

	// A room that refuses what comes by the WebSocket, and one that is gone.
	b.size(1280, 800)
	b.click("#by-socket")
	b.keys("#message", strings.Repeat("x", 20)+"\uE007")
	b.wait("sent", "$('#message').value === ''")
	js[any](b, "$('#message').value = 'x'.repeat(4001)")
	b.keys("#message", "\uE007")
	b.checks(check{"refused", "$('#notice').textContent.startsWith('The server did not take') && $('#message').value.length === 4001"})
	js[any](b, "scrollTo(0, 0); $('#message').value = 'kept'")
	b.click("#break")
	b.keys("#message", "\uE007")
	b.checks(check{"no connection", "$('#notice').textContent.startsWith('Not sure') && $('#message').value === 'kept'"})
}

// readHeader is a header of the answer to the example's handshake.
func readHeader(t *testing.T, url, name string) string {
	t.Helper()
	conn := dial(t, url)
	io.WriteString(conn, shake("/ws"))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	return res.Header.Get(name)
}

// A source receives as a browser's EventSource does: it comes back after retry, with the id of
// the last event that was complete.
type source struct {
	http *http.Client
	url  string
	got  []event // the messages
	ends int     // answers that ended
}

func (s *source) run(ctx context.Context, enough func(*source) bool) error {
	last, retry := "", time.Second
	for {
		req, _ := http.NewRequestWithContext(ctx, "GET", s.url, nil)
		if last != "" {
			req.Header.Set("Last-Event-ID", last)
		}
		res, err := s.http.Do(req)
		if err != nil {
			return err
		}
		in := &eventReader{in: bufio.NewReader(res.Body), lastID: last}
		for err == nil {
			var e event
			e, err = in.next()
			for _, ms := range e.retry {
				retry = time.Duration(ms) * time.Millisecond
			}
			if err == nil {
				last = e.id
			}
			if e.kind == "message" {
				s.got = append(s.got, e)
			} else if e.kind == "gap" {
				return fmt.Errorf("a gap after %d messages", len(s.got))
			}
			if enough(s) {
				res.Body.Close()
				return nil
			}
		}
		s.ends++
		res.Body.Close()
		time.Sleep(retry)
	}
}

// holdBack is a proxy that passes an answer on when it has ended. It ends one that never would,
// anywhere, after a while.
func holdBack(t *testing.T, target string) string {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		if !r.URL.Query().Has("wait") {
			time.AfterFunc(700*time.Millisecond, cancel)
		}
		out, _ := http.NewRequestWithContext(ctx, r.Method, target+r.URL.RequestURI(), nil)
		out.Header = r.Header.Clone()
		res, err := http.DefaultTransport.RoundTrip(out)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil { // cut: a few bytes of the last frame are lost too
			body = body[:max(0, len(body)-7)]
		}
		w.Header().Set("Content-Type", res.Header.Get("Content-Type"))
		w.Write(body)
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

func TestThreeWaysDeliverTheSame(t *testing.T) {
	t.Parallel()
	const n = 60
	room := startRoom(t)
	person := newClient(t, room.url).login("Ada")
	var want []string
	for i := range n {
		want = append(want, lessonKey(i))
	}
	held := holdBack(t, room.url)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for _, c := range []struct {
		name, url string
		ends      int // answers that must have ended at least
	}{
		{"polling", room.url + "/stream?wait=0", 2},
		{"long polling", room.url + "/stream?wait=25s", 5},
		{"SSE", room.url + "/stream", 0},
		{"polling, held back", held + "/stream?wait=0", 2},
		{"long polling, held back", held + "/stream?wait=25s", 5},
		{"SSE, held back and cut", held + "/stream", 2},
	} {
		s := &source{http: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, url: c.url}
		wg.Go(func() {
			err := s.run(ctx, func(s *source) bool { return len(s.got) >= n })
			var ids []string
			for _, e := range s.got {
				ids = append(ids, nameOf(e.id))
			}
			expect(t, err == nil && slices.Equal(ids, want) && s.ends >= c.ends,
				"%s: %v; %d messages in %d answers that ended, want %d, once and in order, in %d or more:\n%q", c.name, err, len(ids), s.ends, n, c.ends, ids)
		})
	}
	for i := range n {
		person.postKey(lessonKey(i), fmt.Sprintf("message %d\nand its second line", i))
		time.Sleep(80 * time.Millisecond) // so that they come over several answers, and all ways differ
	}
	wg.Wait()
}

// ---- websocket ----

// shake is a handshake for a path, with the example's key of RFC 6455. Each change names a header and
// gives it another value or, after the colon, none.
func shake(target string, changes ...string) string {
	lines := []string{"GET " + target + " HTTP/1.1", "Host: chat", "Upgrade: websocket", "Connection: Upgrade",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}
	for _, change := range changes {
		name, value, _ := strings.Cut(change, ":")
		lines = slices.DeleteFunc(lines, func(line string) bool { return strings.HasPrefix(line, name+":") })
		if value != "" {
			lines = append(lines, change)
		}
	}
	return raw(lines...)
}

// A peer is a client's side of a WebSocket, which sends what no library would.
type peer struct {
	t    testing.TB
	conn net.Conn
	in   *bufio.Reader
}

// meet shakes hands.
func meet(t testing.TB, conn net.Conn, handshake string) *peer {
	t.Helper()
	p := &peer{t, conn, bufio.NewReader(conn)}
	io.WriteString(conn, handshake)
	resp, err := http.ReadResponse(p.in, nil)
	require(t, err == nil && resp.StatusCode == 101 && resp.Header.Get("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
		"the handshake is answered %+v, %v", resp, err)
	return p
}

// socket opens a WebSocket with a query such as "after=0", and headers of its own.
func (c *client) socket(query string, headers ...string) *peer {
	c.t.Helper()
	conn := dial(c.t, c.url)
	conn.SetDeadline(time.Now().Add(patience))
	return meet(c.t, conn, shake("/ws?"+query, headers...))
}

// masked is a client's frame. The first byte has the opcode, and 0x80 if it is the last of its message.
func masked(first byte, data string) string {
	return announce(first, len(data), "\x12\xab\x00\xff", data)
}

// announce is a frame with a length and a mask of its own; without a mask its bit is not set.
func announce(first byte, length int, mask, data string) string {
	b := []byte{first}
	switch {
	case length < 126:
		b = append(b, byte(length))
	case length < 1<<16:
		b = append(b, 126, byte(length>>8), byte(length))
	default:
		b = append(b, 127, 0, 0, 0, 0, byte(length>>24), byte(length>>16), byte(length>>8), byte(length))
	}
	if mask != "" {
		b[1] |= 0x80
	}
	b = append(b, mask...)
	for i := range len(data) {
		if mask != "" {
			b = append(b, data[i]^mask[i%4])
		} else {
			b = append(b, data[i])
		}
	}
	return string(b)
}

func say(text string) string { return masked(0x81, "data: "+text) }

func (p *peer) send(frames ...string) {
	p.t.Helper()
	_, err := io.WriteString(p.conn, strings.Join(frames, ""))
	require(p.t, err == nil, "writing to a WebSocket: %v", err)
}

// frame reads a frame and fails unless it is whole and not masked. At the end its opcode is 0xff.
func (p *peer) frame() (op byte, data string) {
	p.t.Helper()
	head := make([]byte, 2)
	if _, err := io.ReadFull(p.in, head); err != nil {
		return 0xff, err.Error()
	}
	size := int(head[1])
	if size == 126 {
		wide := make([]byte, 2)
		io.ReadFull(p.in, wide)
		size = int(wide[0])<<8 | int(wide[1])
		require(p.t, size >= 126, "%d bytes are announced in three", size)
	}
	require(p.t, head[0]&0x80 != 0 && head[0]&0x70 == 0 && head[1] <= 126, "a frame begins with %x", head)
	b := make([]byte, size)
	_, err := io.ReadFull(p.in, b)
	require(p.t, err == nil, "a frame is cut: %v", err)
	return head[0] & 0x0f, string(b)
}

// word is what comes next, in a word: "reply 204", "pong x", "close 1000", "(ping)", a message's text.
func (p *peer) word() string {
	p.t.Helper()
	switch op, data := p.frame(); op {
	case opText:
		e := p.parse(data)
		if e.kind == "reply" {
			return fmt.Sprint("reply ", p.answer(e).Status)
		}
		return tell([]event{e})[0]
	case opPing:
		return "ping " + data
	case opPong:
		return "pong " + data
	case opClose:
		if len(data) == 2 {
			return fmt.Sprintf("close %d", int(data[0])<<8|int(data[1]))
		}
		return "close" + data
	case 0xff:
		if data != "EOF" {
			return "broken: " + data
		}
		return "end"
	default:
		return fmt.Sprintf("opcode %x", op)
	}
}

// parse fails unless a text message is one event and nothing else.
func (p *peer) parse(text string) event {
	p.t.Helper()
	all := slices.Collect(events(strings.NewReader(text)))
	require(p.t, len(all) == 2 && all[1].retry == nil && strings.HasSuffix(text, "\n\n") && strings.Count(text, "\n\n") == 1,
		"a text message is no event: %q", text)
	return all[0]
}

type outcome struct {
	Status     int
	ID, Reason string
	RetryAfter int
}

func (p *peer) answer(e event) (got outcome) {
	p.t.Helper()
	in := json.NewDecoder(strings.NewReader(e.data))
	in.DisallowUnknownFields()
	err := in.Decode(&got)
	require(p.t, err == nil && e.id == "", "a reply is %+v: %v", e, err)
	return got
}

// until returns the words up to and with this one.
func (p *peer) until(word string) (got []string) {
	p.t.Helper()
	for {
		next := p.word()
		if got = append(got, next); next == word {
			return got
		}
		require(p.t, next != "end" && !strings.HasPrefix(next, "broken"), "the WebSocket ended before %q, after %.500q", word, got)
	}
}

// post sends a message and returns how it is answered.
func (p *peer) post(event string) outcome {
	p.t.Helper()
	p.send(masked(0x81, event))
	for {
		op, data := p.frame()
		require(p.t, op != 0xff && op != opClose, "%q is answered with an end", event)
		if op == opText {
			if e := p.parse(data); e.kind == "reply" {
				return p.answer(e)
			}
		}
	}
}

// TestWebSocketFrames goes along RFC 6455. What is not closed in between ends with a close of 1000; then
// the connection must end, and not be reset.
func TestWebSocketFrames(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url)
	closes := func(code int, reason string) string {
		return masked(0x88, string([]byte{byte(code >> 8), byte(code)})+reason)
	}
	// x makes a message of so many bytes, too long to be said but not to arrive.
	x := func(size int) string { return "data: " + strings.Repeat("x", size-6) }
	const long = 65536
	longest := strings.Repeat("好", maxMessage)
	type row struct {
		name, send, want string
		said             []string // what is in the room then
	}
	rows := []row{
		{"a message", say("hello"), "reply 204", []string{"hello"}},
		{"two in one segment", say("one") + say("two"), "reply 204, reply 204", []string{"one", "two"}},
		{"a mask of zeros", announce(0x81, 7, "\x00\x00\x00\x00", "data: a"), "reply 204", []string{"a"}},
		{"a mask of ones", announce(0x81, 7, "\xff\xff\xff\xff", "data: b"), "reply 204", []string{"b"}},
		{"no mask", announce(0x81, 7, "", "data: c"), "close 1002", nil},
		{"a ping without a mask", announce(0x89, 0, "", ""), "close 1002", nil},
		{"a close without a mask", announce(0x88, 0, "", ""), "close 1002", nil},

		{"0 bytes", masked(0x81, ""), "reply 400", nil},
		{"125 bytes", masked(0x81, x(125)), "reply 204", []string{x(125)[6:]}},
		{"126 bytes", masked(0x81, x(126)), "reply 204", []string{x(126)[6:]}},
		{"127 bytes", masked(0x81, x(127)), "reply 204", []string{x(127)[6:]}},
		{"65535 bytes", masked(0x81, x(65535)), "reply 413", nil},
		{"65536 bytes", masked(0x81, x(long)), "reply 413", nil},
		{"65537 bytes", masked(0x81, x(long+1)), "close 1009", nil},
		{"65537 bytes of which none comes", announce(0x81, long+1, "abcd", ""), "close 1009", nil},
		{"2^63-1 bytes", "\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xffabcd", "close 1009", nil},
		{"2^63 bytes", "\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00abcd", "close 1002", nil},
		{"65536 bytes in fragments", masked(0x01, x(60000)) + masked(0x80, strings.Repeat("x", long-60000)), "reply 413", nil},
		{"65537 bytes in fragments", masked(0x01, x(60000)) + masked(0x80, strings.Repeat("x", long-59999)), "close 1009", nil},
		{"a full message, a ping, and nothing more", masked(0x01, x(long)) + masked(0x89, "p") + masked(0x80, ""), "pong p, reply 413", nil},
		{"5 bytes announced in three", "\x81\xfe\x00\x05abcd12345", "close 1002", nil},
		{"125 bytes announced in three", "\x81\xfe\x00\x7dabcd", "close 1002", nil},
		{"126 bytes announced in nine", "\x81\xff\x00\x00\x00\x00\x00\x00\x00\x7eabcd", "close 1002", nil},
		{"65535 bytes announced in nine", "\x81\xff\x00\x00\x00\x00\x00\x00\xff\xffabcd", "close 1002", nil},

		{"a ping", masked(0x89, ""), "pong ", nil},
		{"a ping with a payload", masked(0x89, "hello"), "pong hello", nil},
		{"a ping that is not UTF-8", masked(0x89, "\x00\xff\xfe"), "pong \x00\xff\xfe", nil},
		{"a ping of 125 bytes", masked(0x89, strings.Repeat("p", 125)), "pong " + strings.Repeat("p", 125), nil},
		{"a ping of 126 bytes", masked(0x89, strings.Repeat("p", 126)), "close 1002", nil},
		{"a ping in fragments", masked(0x09, "p") + masked(0x80, "q"), "close 1002", nil},
		{"ten pings", strings.Repeat(masked(0x89, "p"), 10), strings.TrimPrefix(strings.Repeat(", pong p", 10), ", "), nil},
		{"a pong that nobody asked for", masked(0x8a, "hello"), "", nil},
		{"a pong of 126 bytes", masked(0x8a, strings.Repeat("p", 126)), "close 1002", nil},
		{"a pong in fragments", masked(0x0a, ""), "close 1002", nil},

		{"reserved bit 1", masked(0xc1, "data: x"), "close 1002", nil},
		{"reserved bit 2", masked(0xa1, "data: x"), "close 1002", nil},
		{"reserved bit 3", masked(0x91, "data: x"), "close 1002", nil},
		{"reserved bits in a ping", masked(0xf9, ""), "close 1002", nil},
		{"reserved bits in a close", masked(0xf8, ""), "close 1002", nil},
		{"reserved bits in a fragment", masked(0x01, "data: x") + masked(0xc0, "y"), "close 1002", nil},
		{"binary", masked(0x82, "data: x"), "close 1003", nil},
		{"binary in fragments", masked(0x02, "data: x"), "close 1003", nil},
		{"binary within text", masked(0x01, "data: x") + masked(0x82, "y"), "close 1002", nil},

		{"two fragments", masked(0x01, "data: fr") + masked(0x80, "agments"), "reply 204", []string{"fragments"}},
		{"three fragments, one empty", masked(0x01, "data: ") + masked(0x00, "") + masked(0x80, "three"), "reply 204", []string{"three"}},
		{"fragments of which all are empty", masked(0x01, "") + masked(0x00, "") + masked(0x80, ""), "reply 400", nil},
		{"a ping between fragments", masked(0x01, "data: be") + masked(0x89, "p") + masked(0x80, "tween"), "pong p, reply 204", []string{"between"}},
		{"a pong between fragments", masked(0x01, "data: not ") + masked(0x8a, "") + masked(0x80, "told"), "reply 204", []string{"not told"}},
		{"a close between fragments", masked(0x01, "data: x") + closes(1000, "") + masked(0x80, "y"), "close 1000", nil},
		{"a continuation of nothing", masked(0x80, "data: x"), "close 1002", nil},
		{"one that goes on", masked(0x00, "data: x"), "close 1002", nil},
		{"a continuation behind a whole message", say("whole") + masked(0x80, "x"), "reply 204, close 1002", []string{"whole"}},
		{"a message within another", masked(0x01, "data: x") + say("y"), "close 1002", nil},

		{"UTF-8", say("κόσμε 小明 😀"), "reply 204", []string{"κόσμε 小明 😀"}},
		{"UTF-8 cut inside a character", masked(0x01, "data: 小"[:8]) + masked(0x80, "小"[2:]+"明"), "reply 204", []string{"小明"}},
		{"UTF-8 cut inside one by a ping", masked(0x01, "data: \xf0\x9f") + masked(0x89, "\xff") + masked(0x80, "\x98\x80"), "pong \xff, reply 204", []string{"😀"}},
		{"not UTF-8", say("\xff"), "close 1007", nil},
		{"half a character", say("\xe5\xb0"), "close 1007", nil},
		{"half a character in the last of two fragments", masked(0x01, "data: x") + masked(0x80, "\xe5\xb0"), "close 1007", nil},
		{"a surrogate", say("\xed\xa0\x80"), "close 1007", nil},
		{"overlong", say("\xc0\xaf"), "close 1007", nil},
		{"beyond U+10FFFF", say("\xf4\x90\x80\x80"), "close 1007", nil},

		{"a close without a code", masked(0x88, ""), "close", nil},
		{"a close of one byte", masked(0x88, "\x03"), "close 1002", nil},
		{"a close of one byte, which could begin a code", masked(0x88, "\x0c"), "close 1002", nil},
		{"a close with a reason", closes(1000, "bye 再见"), "close 1000", nil},
		{"a reason of 123 bytes", closes(1000, strings.Repeat("r", 123)), "close 1000", nil},
		{"a reason of 124 bytes", closes(1000, strings.Repeat("r", 124)), "close 1002", nil},
		{"a reason that is not UTF-8", closes(1000, "\xff"), "close 1007", nil},
		{"a close in fragments", masked(0x08, "\x03\xe8"), "close 1002", nil},
		{"a message behind a close", closes(1000, "") + say("too late"), "close 1000", nil},
		{"two closes", closes(1000, "") + closes(1001, ""), "close 1000", nil},
		{"a ping behind a close", closes(1000, "") + masked(0x89, "p"), "close 1000", nil},
		{"much behind what is forbidden", "\xff" + strings.Repeat("x", 1<<20), "close 1002", nil},

		{"several lines", masked(0x81, "data: one\ndata:two\ndata:  three\n\n"), "reply 204", []string{"one\ntwo\n three"}},
		{"lines that end in CR and CRLF", masked(0x81, "data: cr\rdata: crlf\r\ndata: lf\r\n\r\n"), "reply 204", []string{"cr\ncrlf\nlf"}},
		{"a forged event", say("a\u2028\u2028event: gap"), "reply 204", []string{"a\n\nevent: gap"}},
		{"an id without a text", masked(0x81, "id: key-of-a-message-0001"), "reply 422", nil},
		{"a blank text", say(" \u2003"), "reply 422", nil},
		{"a key that is short", masked(0x81, "id: short\ndata: x"), "reply 400", nil},
		{"an empty key", masked(0x81, "id:\ndata: x"), "reply 400", nil},
		{"two keys", masked(0x81, "id: key-of-a-message-0001\nid: key-of-a-message-0001\ndata: x"), "reply 400", nil},
		{"a bare text", masked(0x81, "hello"), "reply 400", nil},
		{"an event of another kind", masked(0x81, "event: gap\ndata: x\n\n"), "reply 400", nil},
		{"a comment", masked(0x81, ": x\ndata: x"), "reply 400", nil},
		{"two events", masked(0x81, "data: x\n\ndata: y\n\n"), "reply 400", nil},
		{"a field without a colon", masked(0x81, "data"), "reply 400", nil},
		{"4000 characters", say(longest), "reply 204", []string{longest}},
		{"4001 characters", say(longest + "好"), "reply 413", nil},
		{"what is refused ends nothing", masked(0x81, "hello") + say("again"), "reply 400, reply 204", []string{"again"}},
	}
	for _, opcode := range []byte{3, 4, 5, 6, 7, 11, 12, 13, 14, 15} {
		rows = append(rows, row{fmt.Sprint("opcode ", opcode), masked(0x80|opcode, "x"[:opcode%2]), "close 1002", nil})
	}
	for _, code := range []int{1001, 1003, 1007, 1014, 3000, 4999} {
		rows = append(rows, row{fmt.Sprint("code ", code), closes(code, ""), fmt.Sprint("close ", code), nil})
	}
	for _, code := range []int{0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535} {
		rows = append(rows, row{fmt.Sprint("code ", code), closes(code, ""), "close 1002", nil})
	}
	for _, test := range rows {
		for _, atATime := range []int{1 << 20, 1} {
			if atATime == 1 && len(test.send) > 1000 {
				continue
			}
			before := c.newcomer()
			p := c.socket("after=x")
			go func() { // the server may answer before it is all written
				bytes := []byte(test.send)
				for part := range slices.Chunk(bytes, atATime) {
					p.conn.Write(part)
				}
				p.conn.Write([]byte(closes(1000, "")))
			}()
			var got []string
			for word := p.word(); word != "end"; word = p.word() {
				if word, _, _ := strings.Cut(word, " "); word != "reply" && word != "pong" && word != "close" && word != "broken:" {
					continue
				}
				if got = append(got, word); strings.HasPrefix(word, "broken") {
					break
				}
			}
			want := test.want
			if !strings.Contains(want, "close") {
				want = strings.TrimPrefix(want+", close 1000", ", ")
			}
			same(t, strings.Join(got, ", "), want, "%s, %d bytes at a time", test.name, atATime)
			now := c.newcomer()
			same(t, now[min(len(before), len(now)):], test.said, "%s, %d bytes at a time: the room has more", test.name, atATime)
		}
	}
}

func TestWebSocketHandshake(t *testing.T) {
	t.Parallel()
	const trusted = "https://chat.example"
	room := startRoom(t, "-origin", trusted)
	c := newClient(t, room.url)
	closed := newClient(t, startRoom(t, "CHAT_PASSWORD=blue whale").url)
	cookie := func(name, value string) string { return "Cookie: " + name + "=" + value }
	login := closed.cookie("/login", form("user", "小明", "password", "blue whale"))
	for _, test := range []struct {
		name, request string
		at            *client
		status        int
	}{
		{"as in RFC 6455", shake("/ws"), c, 101},
		{"in other cases", shake("/ws", "Upgrade: WebSocket", "Connection: UPGRADE"), c, 101},
		{"as Firefox", shake("/ws", "Connection: keep-alive, Upgrade"), c, 101},
		{"one of two protocols", shake("/ws", "Upgrade: h2c, websocket"), c, 101},
		{"an extension is not taken up", shake("/ws", "Sec-WebSocket-Extensions: permessage-deflate"), c, 101},
		{"nor is a protocol", shake("/ws", "Sec-WebSocket-Protocol: chat"), c, 101},
		{"wait= is not for it", shake("/ws?wait=0"), c, 101},

		{"no handshake", rawGet("/ws"), c, 426},
		{"no Upgrade", shake("/ws", "Upgrade:"), c, 426},
		{"another protocol", shake("/ws", "Upgrade: h2c"), c, 426},
		{"no version", shake("/ws", "Sec-WebSocket-Version:"), c, 426},
		{"version 8", shake("/ws", "Sec-WebSocket-Version: 8"), c, 426},
		{"version 13 with something behind", shake("/ws", "Sec-WebSocket-Version: 13x"), c, 426},
		{"HTTP/1.0", strings.Replace(shake("/ws"), "HTTP/1.1", "HTTP/1.0", 1), c, 426},
		{"HEAD", strings.Replace(shake("/ws"), "GET", "HEAD", 1), c, 426},
		{"POST", strings.Replace(shake("/ws"), "GET", "POST", 1), c, 405},
		{"a version before the key", shake("/ws", "Sec-WebSocket-Version: 8", "Sec-WebSocket-Key:"), c, 426},

		{"no Connection", shake("/ws", "Connection:"), c, 400},
		{"Connection: close", shake("/ws", "Connection: close"), c, 400},
		{"no key", shake("/ws", "Sec-WebSocket-Key:"), c, 400},
		{"an empty key", shake("/ws", "Sec-WebSocket-Key: "), c, 400},
		{"a key of 15 bytes", shake("/ws", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAA"), c, 400},
		{"a key of 17 bytes", shake("/ws", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAAA="), c, 400},
		{"a key that is no base64", shake("/ws", "Sec-WebSocket-Key: !GhlIHNhbXBsZSBub25jZQ=="), c, 400},
		{"a key before the origin", shake("/ws", "Sec-WebSocket-Key:", "Origin: http://evil.example"), c, 400},
		{"a query that is broken", shake("/ws?after=%zz"), c, 400},

		{"the own page", shake("/ws", "Origin: http://chat"), c, 101},
		{"the own page over TLS", shake("/ws", "Origin: https://chat"), c, 101},
		{"-origin", shake("/ws", "Origin: "+trusted), c, 101},
		{"another site's page", shake("/ws", "Origin: http://evil.example"), c, 403},
		{"another port", shake("/ws", "Origin: http://chat:8080"), c, 403},
		{"no site's page", shake("/ws", "Origin: null"), c, 403},
		{"another site's page that says it is ours", shake("/ws", "Origin: http://evil.example", "Sec-Fetch-Site: same-origin"), c, 403},
		{"a browser that takes ws: for another site", shake("/ws", "Origin: http://chat", "Sec-Fetch-Site: cross-site"), c, 101},
		{"an origin before the session", shake("/ws", "Origin: null"), closed, 403},

		{"a closed room without a session", shake("/ws"), closed, 401},
		{"with a broken one", shake("/ws", cookie(login.Name, login.Value+"x")), closed, 401},
		{"with one", shake("/ws", cookie(login.Name, login.Value)), closed, 101},
		{"an open room with a broken session, to read", shake("/ws", cookie(login.Name, "x")), c, 101},
	} {
		got := rawRequest(t, test.at.url, test.request)
		h := got.header
		expect(t, got.status == test.status, "%s: got %d %q, want %d", test.name, got.status, got.body, test.status)
		protocol := map[int]string{101: "websocket", 426: "websocket"}[got.status]
		version := map[int]string{426: "13"}[got.status]
		accept := map[int]string{101: "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="}[got.status]
		expect(t, h.Get("Upgrade") == protocol && h.Get("Sec-WebSocket-Version") == version && h.Get("Sec-WebSocket-Accept") == accept && (protocol == "" || h.Get("Connection") == "Upgrade" || test.name == "HTTP/1.0") && h.Get("Sec-WebSocket-Protocol")+h.Get("Sec-WebSocket-Extensions") == "",
			"%s: got %d with %v", test.name, got.status, h)
	}
	expect(t, strings.Contains(rawRequest(t, c.url, shake("/ws", "Origin: http://evil.example")).body, "-origin"), "another site's page is not told what to do")
	room.changed()
}

// What comes through a WebSocket is byte for byte what comes on /stream, but for retry:, which differs.
func TestWebSocketSendsTheSame(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url)
	long := strings.Repeat("好\n", maxMessage/2)
	var last string
	for i := range 50 {
		last = c.sayAs(fmt.Sprintf("key-of-a-message-%04d", i), fmt.Sprint(i, "\nline\n", strings.Repeat("x", i))) // frames of 126 bytes, too
	}
	c.say(long)
	want, _, _ := strings.Cut(c.get("/stream?wait=0").body[len("retry: 2000\n"):], "event: ping")
	for _, query := range []string{"", "after=0", "after=" + url.QueryEscape("x")} {
		p, got := c.socket(query), ""
		for i := 0; ; i++ {
			op, text := p.frame()
			if retry := regexp.MustCompile(`^retry: [1-4]\d\d\d\n`).FindString(text); op != opText || (retry != "") != (i == 0) {
				t.Fatalf("text message %d is %x %.50q, want retry: in the first", i, op, text)
			} else if text = text[len(retry):]; query == "after=x" && i == 0 {
				require(t, text == string(gapFrame), "after an unknown id it begins with %q", text)
				continue
			}
			p.parse(text)
			if strings.HasPrefix(text, "event: ping\nid: ") {
				break
			}
			got += text
		}
		same(t, got, want, "%q brings", query)
	}
	peers := map[string]*peer{"?after=": c.socket("after=" + last), "Last-Event-ID": c.socket("", "Last-Event-ID: "+last),
		"?wait=, which is nothing to a WebSocket,": c.socket("wait=0&after=" + last)}
	for name, p := range peers {
		same(t, p.word(), long, "with %s comes", name)
	}
	c.say("later")
	for _, p := range peers {
		p.until("later")
	}
}

// What comes with the handshake is not lost, and not answered before the line with retry:.
func TestWebSocketEarly(t *testing.T) {
	t.Parallel()
	c := newClient(t, startRoom(t).url)
	conn := dial(t, c.url)
	conn.SetDeadline(time.Now().Add(patience))
	p := meet(t, conn, shake("/ws")+say("early")+masked(0x89, "p")+say("again"))
	op, text := p.frame()
	expect(t, op == opText && strings.HasPrefix(text, "retry: "), "first comes %x %q", op, text)
	got := append(append(p.until("reply 204"), p.until("pong p")...), p.until("reply 204")...)
	same(t, c.newcomer(), []string{"early", "again"}, "after %q the room has", got)
}

// Posts through a WebSocket are those of POST /post: same checks, same order, one after the other.
func TestWebSocketPosts(t *testing.T) {
	t.Parallel()
	room := startRoom(t, "-rate", "0.01")
	c := newClient(t, room.url).login("小明")
	w := newWitness(t, room.url)
	session := c.session()
	p := c.socket("", "Cookie: "+session.Name+"="+session.Value)
	first := p.post("id: " + keyA + "\ndata: hello\n\n")
	expect(t, first.Status == 204 && nameOf(first.ID) == keyA && first.Reason == "" && first.RetryAfter == 0, "a post is answered %+v", first)
	same(t, p.post("data: another text\nid: "+keyA), first, "the same key again is answered")
	same(t, c.sayAs(keyA, "by POST"), first.ID, "by POST the key has the id")
	want := []string{"小明: hello"}
	for i := range postBurst - 1 {
		p.send(say(fmt.Sprint(i)))
		want = append(want, fmt.Sprint("小明: ", i))
	}
	for i := 0; i < postBurst-1; {
		if word := p.word(); word == "reply 204" {
			i++
		} else if strings.HasPrefix(word, "reply") {
			t.Fatalf("a post is answered %q", word)
		}
	}
	got := p.post("data: one too many")
	expect(t, got.Status == 429 && got.Reason == "too fast" && got.RetryAfter >= 50 && got.ID == "", "too fast is answered %+v", got)
	got = p.post("data: " + strings.Repeat("x", maxMessage+1))
	expect(t, got.Status == 413 && got.RetryAfter == 0 && got.Reason != "", "too much is answered %+v", got)
	stranger := c.socket("", "Cookie: "+session.Name+"="+session.Value+"x")
	same(t, stranger.post("hello"), outcome{Status: 401, Reason: "log in first"}, "with a broken session, before all else, a post is answered")
	same(t, string(reply(429, "too fast", 400*time.Millisecond)),
		"event: reply\ndata: {\"status\":429,\"reason\":\"too fast\",\"retryAfter\":1}\n\n", "part of a second is told as")
	broken := newClient(t, room.url).socket("")
	broken.send(announce(0x81, 100, "abcd", "data: cut off"))
	must(t, broken.conn.(*net.TCPConn).CloseWrite())
	for word := ""; word != "end" && !strings.HasPrefix(word, "broken"); {
		word = broken.word()
	}
	same(t, len(c.newcomer()), len(want), "after a frame that was cut off the room has as many as before:")
	w.heard(want...)
}

// When Redis is away posts are refused, the reader stays; a post that waits at the end is not for ever.
func TestWebSocketWithoutRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	room := r.room().joined()
	p := newClient(t, room.url).socket("")
	p.until("(ping)")
	r.signal("STOP")
	got := p.post("data: x")
	expect(t, got.Status == 503 && got.RetryAfter >= 1 && got.RetryAfter <= 3,
		"without Redis a post is answered %+v, want 503 and when to come back", got)
	p.send(say("waits"))
	time.Sleep(100 * time.Millisecond)
	start := time.Now()
	err := room.stop()
	expect(t, err == nil && time.Since(start) <= 10*time.Second, "it ends with %v after %v", err, time.Since(start))
	r.signal("CONT")
	p = newClient(t, startRoom(t, "-redis", "localhost:"+freePort(t)).url).socket("", "Cookie: chat_session=x")
	same(t, p.post("data: x").Reason, cannotTell, "before the key is known a post is refused with")
}

// TestWebSocketAtTheEnd has many open: each is told when to come back, and then 1001.
func TestWebSocketAtTheEnd(t *testing.T) {
	t.Parallel()
	r := startRoom(t)
	c := newClient(t, r.url)
	id := c.sayAs(keyA, "hello")
	var open []*peer
	for range 100 {
		p := c.socket("after=" + id)
		p.until("(ping)")
		open = append(open, p)
	}
	var told sync.WaitGroup
	var cut atomic.Int64
	for _, p := range open {
		told.Go(func() {
			defer p.conn.Close()
			op, text := p.frame()
			for op == opPing || op == opText && !strings.HasPrefix(text, "retry: ") { // of a silence, on a busy machine
				op, text = p.frame()
			}
			if op == 0xff {
				cut.Add(1)
				return
			}
			e := slices.Collect(events(strings.NewReader(text)))[0]
			expect(t, op == opText && e.kind == "ping" && e.id == id && len(e.retry) == 1 && e.retry[0] >= 1000 && e.retry[0] <= 4000,
				"at the end comes %x %q", op, text)
			same(t, p.word(), "close 1001", "then comes")
			p.send(masked(0x88, "\x03\xe9"))
			same(t, p.word(), "end", "then comes")
		})
	}
	start := time.Now()
	same(t, r.stop(), nil, "it ended with")
	t.Logf("it took %v", time.Since(start))
	told.Wait()
	expect(t, cut.Load() <= 50, "%d of 100 were cut off before they were told", cut.Load()) // a busy machine may take over stopTimeout
}

// What a peer does that is no use to anybody costs the room no more than a stream would, and not for long.
func TestWebSocketInTime(t *testing.T) {
	const second = time.Second
	every := func(pause time.Duration, what string) func(conn net.Conn) {
		return func(conn net.Conn) {
			for i := 0; ; i++ {
				time.Sleep(pause)
				if _, err := conn.Write([]byte{what[i%len(what)]}); err != nil {
					return
				}
			}
		}
	}
	for _, test := range []struct {
		name  string
		reads bool
		does  func(conn net.Conn)
		stays time.Duration // if the room stays open
		stops time.Duration // how long shutdown takes
	}{
		{"reads nothing", false, func(conn net.Conn) {}, writeTimeout + writeRenew, stopTimeout},
		{"answers nothing", true, func(conn net.Conn) {}, heartbeat + pongTimeout, stopTimeout},
		{"sends one byte after the ping", true, func(conn net.Conn) { time.Sleep(16 * second); io.WriteString(conn, "\x81") },
			2*heartbeat + pongTimeout, stopTimeout},
		{"sends a byte a minute", true, every(61*second, say("never whole")), heartbeat + pongTimeout, stopTimeout},
		{"sends a byte in 40 s", true, every(40*second, masked(0x81, strings.Repeat("x", 60000))), never, stopTimeout},
		{"pings in 20 s", true, every(20*second, "\x89\x80abcd"), never, stopTimeout},
		{"posts in 40 s", true, func(conn net.Conn) {
			for {
				time.Sleep(40 * second)
				if _, err := io.WriteString(conn, say("hello")); err != nil {
					return
				}
			}
		}, never, stopTimeout},
		{"announces much and sends nothing", true, func(conn net.Conn) { io.WriteString(conn, announce(0x81, 65536, "abcd", "")) },
			heartbeat + pongTimeout, stopTimeout},
		{"goes without a word", true, func(conn net.Conn) { conn.Close() }, 0, 0},
		{"closes and stays", true, func(conn net.Conn) { io.WriteString(conn, masked(0x88, "\x03\xe8")) }, closeTimeout, stopTimeout},
		{"breaks the rules and stays", true, func(conn net.Conn) { io.WriteString(conn, "\xff\xff") }, closeTimeout, stopTimeout},
		{"closes, and then never ends", true, func(conn net.Conn) {
			io.WriteString(conn, masked(0x88, ""))
			every(second, "x")(conn)
		}, closeTimeout, stopTimeout},
	} {
		inTime(t, test.name, test.stays, test.stops, func(pipes pipeListener) (end func()) {
			here, there := net.Pipe()
			pipes <- there
			io.WriteString(here, shake("/ws"))
			if test.reads {
				go io.Copy(io.Discard, here)
			}
			synctest.Wait()
			var doing sync.WaitGroup
			doing.Go(func() { test.does(here) })
			synctest.Wait()
			return func() { here.Close(); doing.Wait() }
		})
	}
}

// In a silence both pings come, every 15 s. Who is closed by the process answers, and that is the end.
func TestWebSocketPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, &config{}, t.Logf)
		srv, pipes := s.httpServer(t.Context()), make(pipeListener)
		go srv.Serve(pipes)
		here, there := net.Pipe()
		pipes <- there
		start := time.Now()
		p := meet(t, here, shake("/ws"))
		for i, want := range []string{"(ping)", "(ping)", "ping ", "(ping)", "ping ", "reply 204", "hello", "(ping)", "ping "} {
			got := p.word()
			at := heartbeat * time.Duration((i+1)/2)
			if i > 4 {
				at = 2*heartbeat + time.Second
			}
			if i > 6 {
				at += heartbeat
			}
			if i == 6 && got == "reply 204" || i == 5 && got == "hello" {
				continue // two goroutines write
			}
			expect(t, got == want && time.Since(start) == at, "%v: %q, want %q after %v", time.Since(start), got, want, at)
			if i == 4 {
				time.Sleep(time.Second)
				p.send(say("hello"))
			}
		}
		ended := make(chan time.Duration)
		start = time.Now()
		go func() {
			s.shutdown(srv)
			ended <- time.Since(start)
		}()
		same(t, p.until("close 1001"), []string{"(ping)", "close 1001"}, "at the end comes")
		p.send(masked(0x88, "\x03\xe9"))
		here.Close()
		same(t, <-ended, 0, "a peer that closes holds the end up for")
	})
}

// FuzzWebSocket: whatever comes, the reader takes no more than a message may have, and what it takes for
// one is UTF-8 that was sent whole, whatever the pieces in which it comes.
func FuzzWebSocket(f *testing.F) {
	for _, s := range []string{"", say("hello"), masked(0x89, "p") + masked(0x88, "\x03\xe8"), masked(0x01, "a") + masked(0x80, "b"),
		masked(0x82, "x"), announce(0x81, 65536, "abcd", "x"), "\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xffabcd", "\x81\xfe\x00\x05abcd12345",
		announce(0x81, 3, "", "abc"), "\xff\xff", masked(0x8a, strings.Repeat("x", 125)), say(strings.Repeat("x", 300))} {
		f.Add([]byte(s), 70)
	}
	f.Fuzz(func(t *testing.T, sent []byte, room int) {
		if room < 0 || room > maxBody {
			return
		}
		for _, more := range []bool{false, true} {
			in := bytes.NewReader(sent)
			op, last, data, err := readFrame(in, room, more)
			slowly := iotest.OneByteReader(bytes.NewReader(sent))
			op2, last2, data2, err2 := readFrame(slowly, room, more)
			require(t, op == op2 && last == last2 && bytes.Equal(data, data2) && (err == nil) == (err2 == nil),
				"%x reads as %x %v %x %v, and a byte at a time as %x %v %x %v", sent, op, last, data, err, op2, last2, data2, err2)
			control := op == opClose || op == opPing || op == opPong
			require(t, len(data) <= max(room, 125) && cap(data) <= 2*max(room, 512) && (!control || len(data) <= 125),
				"%x reads as %d bytes in %d, with room for %d", sent, len(data), cap(data), room)
			if err != nil {
				continue
			}
			taken := sent[:len(sent)-in.Len()]
			if op == opClose && slices.Contains([]string{forbidden, notText, tooLong}, string(data)) {
				continue // a close of its own, or one like it
			}
			require(t, (control || op <= opText && more == (op == opMore)) && (!control || last),
				"%x reads as opcode %x, %v, more %v", sent, op, last, more)
			first := op
			if last {
				first |= 0x80
			}
			mask := taken[len(taken)-len(data)-4 : len(taken)-len(data)]
			again := announce(first, len(data), string(mask), string(data))
			require(t, again == string(taken), "%x reads as %x %v %x, which is sent as %x", taken, op, last, data, again)
		}
	})
}

// pythonReader hears the room through Debian's websockets, coming back as /stream's readers do: to the
// next address, with the last id. It prints each text, "(gap)" if there was one, and how a post of its
// own was answered; after the text "last" it ends.
const pythonReader = `
import asyncio, json, sys, websockets
async def hear(urls):
    last, n, got = "", 0, []
    while not got or got[-1] != "last":
        try:
            async with websockets.connect(urls[n % len(urls)] + "/ws?after=" + last, close_timeout=1) as room:
                print("(open)", flush=True)
                async for event in room:
                    lines = event.rstrip("\n").split("\n")
                    fields = dict(line.split(": ", 1) if ": " in line else (line[:-1], "") for line in lines)
                    last = fields.get("id", last)
                    if fields.get("event") == "gap":
                        got.append("(gap)")
                    elif "event" not in fields:
                        got.append(fields["data"].split(": ", 1)[1])
                    if got and got[-1] == "last":
                        return got
        except (OSError, websockets.WebSocketException) as e:
            print("(%s)" % type(e).__name__, file=sys.stderr, flush=True)
        n += 1
        await asyncio.sleep(0.05)
print("\n".join(asyncio.run(hear(sys.argv[1:]))))
`

// pythonWriter posts through one WebSocket, each text under a key of its own, and every third again.
const pythonWriter = `
import asyncio, json, sys, websockets
async def post(room, key, text):
    await room.send("id: %s\ndata: %s\n\n" % (key, text))
    while True:
        event = await room.recv()
        if event.startswith("event: reply\n"):
            return json.loads(event.split("data: ", 1)[1])
async def main(url, n):
    async with websockets.connect(url + "/ws", ping_interval=0.2) as room:
        for i in range(n):
            key = "key-of-a-message-%04d" % i
            answers = [await post(room, key, "text %d" % i) for _ in range(1 + (i % 3 == 0))]
            assert all(a["status"] == 204 and a["id"].split("~")[0] == key for a in answers), answers
            assert len(set(a["id"] for a in answers)) == 1, answers
        for text in ["", "x" * 4001]:
            print(json.dumps(await post(room, "key-of-another-one-1", text)))
asyncio.run(main(sys.argv[1], int(sys.argv[2])))
`

// python is a command for a program that uses one of Debian's modules.
func python(t testing.TB, module, program string, args ...string) *exec.Cmd {
	t.Helper()
	const path = "/usr/bin/python3" // Debian's, whatever other there is
	if err := exec.Command(path, "-c", "import "+module).Run(); err != nil {
		need(t, "python3 with "+module, "apt-get install python3-"+module)
	}
	return exec.Command(path, append([]string{"-c", program}, args...)...)
}

// ws is the address of a room for WebSockets.
func (p *program) ws() string { return "ws" + strings.TrimPrefix(p.url, "http") }

// changing says 500 texts to a room of three processes, the last of which stays. The first is told to
// end and the second is killed on the way. It returns what was said; halfway is called when the first
// texts are in.
func changing(t *testing.T, processes []*program) (want []string) {
	t.Helper()
	c := newClient(t, processes[2].url)
	for i := range 500 {
		text := fmt.Sprint("text ", i)
		c.say(text)
		want = append(want, text)
		switch i {
		case 150:
			processes[0].signal("TERM")
			same(t, processes[0].wait(patience), nil, "SIGTERM ends it with")
		case 330:
			processes[1].kill()
		}
		time.Sleep(2 * time.Millisecond) // so that they come in many pieces
	}
	c.say("last")
	return append(want, "last")
}

func TestWebSocketOfPython(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	var processes []*program
	var urls []string
	for range 3 {
		p := startProcess(t, "-redis", r.addr).joined()
		processes, urls = append(processes, p), append(urls, p.ws())
	}
	reader := launch(t, python(t, "websockets", pythonReader, urls...))
	eventually(t, "Python to listen", func() bool { return strings.Contains(reader.out.String(), "(open)") })
	want := changing(t, processes)
	must(t, reader.wait(patience))
	got := slices.DeleteFunc(strings.Split(strings.TrimSpace(reader.out.String()), "\n"), func(line string) bool { return line == "(open)" })
	expect(t, slices.Equal(got, want) && strings.Count(reader.out.String(), "(open)") >= 3,
		"it heard %d texts over %d connections, want %d, in order:\n%.2000q", len(got), strings.Count(reader.out.String(), "(open)"), len(want), got)

	c := newClient(t, processes[2].url)
	before := len(r.history())
	out, err := python(t, "websockets", pythonWriter, processes[2].ws(), "60").CombinedOutput()
	expect(t, err == nil && strings.Count(string(out), `"status": 4`) == 2 && strings.Count(string(out), `"reason": "`) == 2,
		"posting through a WebSocket: %v\n%s", err, out)
	same(t, len(r.history()), before+60, "60 posts, some of them sent twice: in Redis")
	got = c.newcomer()
	same(t, got[max(0, len(got)-2):], []string{"text 58", "text 59"}, "the newest")
}

// browserReader does the same in a browser, and posts.
const browserReader = `
const [urls, window_] = [arguments[0], window];
window_.got = []; window_.opened = 0; window_.codes = []; window_.replies = [];
let last = "", n = 0;
const open = () => {
	const room = window_.room = new WebSocket(urls[n++ % urls.length] + "/ws?after=" + encodeURIComponent(last));
	room.onopen = () => window_.opened++;
	room.onmessage = ({ data }) => {
		const field = (name) => (data.match(new RegExp("^" + name + ": ?(.*)$", "m")) || [])[1];
		last = field("id") ?? last;
		if (field("event") === "reply") window_.replies.push(JSON.parse(field("data")));
		else if (field("event") === "gap") window_.got.push("(gap)");
		else if (field("event") === undefined) window_.got.push(field("data").replace(/^.*?: /, ""));
	};
	room.onclose = ({ code }) => { window_.codes.push(code); if (window_.got.at(-1) !== "last") setTimeout(open, 50); };
};
open();
`

func TestWebSocketOfChromium(t *testing.T) {
	r := startRedis(t)
	port := freePort(t)
	stays := startProcess(t, "-redis", r.addr, "-addr", "127.0.0.1:"+port).joined()
	processes, urls := []*program{nil, nil, stays}, []string{"", "", stays.ws()}
	for i := range 2 {
		processes[i] = startProcess(t, "-redis", r.addr, "-origin", stays.url).joined()
		urls[i] = processes[i].ws()
	}
	b := startBrowser(t)
	b.open(stays.url + "/healthz") // a page without a Content-Security-Policy, of an origin that all know
	js[any](b, browserReader, urls)
	b.wait("Chromium to listen", "window.opened === 1")
	want := changing(t, processes)
	b.waitFor("the last text", patience, "window.got.at(-1) === 'last'")
	got := js[[]string](b, "return window.got")
	expect(t, slices.Equal(got, want), "it heard %d texts, want %d, in order:\n%.2000q", len(got), len(want), got)
	codes := js[[]int](b, "return window.codes")
	expect(t, len(codes) >= 2 && codes[0] == 1001 && codes[1] == 1006,
		"the WebSockets ended with %v, want 1001 for SIGTERM and 1006 for SIGKILL first", codes)

	js[any](b, `for (let i = 0; i < 20; i++) for (let again = 0; again < 2; again++)
		window.room.send("id: key-of-a-message-" + String(i).padStart(4, "0") + "\ndata: 你好 " + i);
		window.room.send("no event")`)
	b.wait("all replies", "window.replies.length === 41")
	answers := js[[]outcome](b, "return window.replies")
	for i, a := range answers[:40] {
		want := fmt.Sprintf("key-of-a-message-%04d", i/2)
		expect(t, a.Status == 204 && nameOf(a.ID) == want && a.ID == answers[i/2*2].ID,
			"post %d is answered %+v, want 204 and the id of %s", i, a, want)
	}
	expect(t, answers[40].Status == 400, "what is no event is answered %+v", answers[40])
	if got := newClient(t, stays.url).newcomer(); len(r.history()) != len(want)+20 || got[len(got)-1] != "你好 19" {
		t.Errorf("20 posts, each sent twice, are %d in Redis", len(r.history())-len(want))
	}
	js[any](b, "window.room.close(3001, 'bye')")
	b.wait("an answer to a close", "window.codes.at(-1) === 3001")

	// A page of another site is refused, with whatever cookies it has.
	js[any](b, "const other = new WebSocket(arguments[0] + '/ws'); other.onclose = () => window.refused = other.readyState; other.onopen = () => window.refused = 'open'",
		"ws://localhost:"+port)
	b.wait("another site to be refused", "window.refused === 3")

	// The chat page's own policy lets a console open one.
	b.open(stays.url + "/login")
	js[any](b, "const room = new WebSocket('ws://' + location.host + '/ws'); room.onmessage = () => window.heard = true")
	b.wait("a page of the room to hear it", "window.heard")
}

// Behind the proxies of the documents a WebSocket works as without: the session, the end, and /stream
// beside it.
func TestWebSocketBehindProxies(t *testing.T) {
	t.Parallel()
	twoServers := func(t *testing.T, block string, oldnew ...string) (text string, rooms []*program) {
		t.Helper()
		r := startRedis(t)
		for _, port := range []string{"127.0.0.1:8989", "127.0.0.1:8990"} {
			room := startProcess(t, "-redis", r.addr).joined()
			rooms, oldnew = append(rooms, room), append(oldnew, port, strings.TrimPrefix(room.url, "http://"))
		}
		return adapt(t, block, oldnew...), rooms
	}
	for _, test := range []struct {
		name  string
		start func(t *testing.T) (addr string, rooms []*program)
	}{
		{"nginx and one process", func(t *testing.T) (string, []*program) {
			return behindNginx(t, "", ""), nil
		}},
		{"nginx and two", func(t *testing.T) (addr string, rooms []*program) {
			addr, _ = serve(t, func(addr string) *exec.Cmd {
				var block string
				block, rooms = twoServers(t, blocks(t, "nginx")[1], "listen 443 ssl http2;", "listen "+addr+";",
					"listen 80;", "listen 127.0.0.3:"+freePort(t)+";", "listen [::]:80;", "", "listen [::]:443 ssl http2;", "")
				return nginx(t, "", regexp.MustCompile(`ssl_certificate\w* [^;]*;`).ReplaceAllString(block, ""))
			})
			return addr, rooms
		}},
		{"Caddy and two", func(t *testing.T) (addr string, rooms []*program) {
			addr, _ = serve(t, func(addr string) *exec.Cmd {
				var block string
				block, rooms = twoServers(t, blocks(t, "caddyfile")[0], "chat.example.org {", "http://"+addr+" {")
				return caddy(t, block)
			})
			return addr, rooms
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			addr, rooms := test.start(t)
			c := newClient(t, "http://"+addr)
			eventually(t, "the proxy to answer", func() bool {
				got, _ := c.try("GET", "/healthz", "")
				return got.status == 200
			})
			c.login("小明")
			session := "Cookie: " + c.session().Name + "=" + c.session().Value
			own := []string{"Host: " + addr, session, "Origin: http://" + addr}
			live, p := c.stream("", ""), c.socket("", own...)
			live.until("ping")
			p.until("(ping)")
			for i := range 5 { // each arrives by itself, both ways
				text := fmt.Sprint("one by one ", i)
				p.send(say(text), masked(0x89, text))
				live.hears("小明: " + text)
				got := []string{p.word(), p.word(), p.word()}
				slices.Sort(got)
				want := []string{text, "pong " + text, "reply 204"}
				require(t, slices.Equal(got, want), "got %q, want %q", got, want)
			}
			same(t, rawRequest(t, c.url, shake("/ws", "Host: "+addr, "Origin: http://other.example")).status, 403, "a page of another site gets")
			same(t, rawRequest(t, c.url, shake("/ws", "Host: "+addr, "Upgrade:")).status, 426, "without a handshake comes")
			p.send(masked(0x88, "\x0b\xb9"))
			same(t, append(p.until("close 3001"), p.word()), []string{"close 3001", "end"}, "a close is answered")

			if rooms == nil {
				return
			}
			all := c.poll("")
			after := "after=" + all[len(all)-1].id
			two := []*peer{c.socket(after, own...), c.socket(after, own...)}
			for _, p := range two {
				p.until("(ping)")
			}
			rooms[0].signal("TERM")
			rooms[0].wait(patience)
			c.insist("after")
			for _, p := range two { // each at either process
				got := []string{p.word()}
				if got[0] == "(ping)" {
					got = append(got, p.word(), p.word())
				}
				expect(t, slices.Equal(got, []string{"after"}) || slices.Equal(got, []string{"(ping)", "close 1001", "end"}),
					"when a process ends comes %q", got)
			}
		})
	}
}

// What the documents show of a browser's console and of Python is run.
func TestWebSocketInDocuments(t *testing.T) {
	t.Parallel()
	room := startRoom(t)
	c := newClient(t, room.url)
	live := c.stream("", "")
	here := strings.NewReplacer("localhost:8989", strings.TrimPrefix(room.url, "http://"))

	cmd := python(t, "websockets", "")
	cmd.Args = []string{cmd.Path, "-m", "asyncio"}
	typed, err := cmd.StdinPipe()
	must(t, err)
	shell := launch(t, cmd)
	io.WriteString(typed, here.Replace(blocks(t, "python")[0])+"\n")
	live.hears("anonymous: hello from Python")
	eventually(t, "Python to print the message and the reply", func() bool {
		out := shell.out.String()
		return strings.Contains(out, "anonymous: hello from Python") && strings.Contains(out, `{"status":204,"id":"`)
	})

	b := startBrowser(t)
	b.open(room.url + "/login")
	js[any](b, "window.said = []; console.log = (text) => window.said.push(text)")
	js[any](b, here.Replace(blocks(t, "js")[0]))
	live.hears("anonymous: hello from the console")
	b.wait("the console to show the message and the reply",
		`["anonymous: hello from the console", '{"status":204,"id":"'].every((part) => said.some((text) => text.includes(part)))`)
}

// BenchmarkWebSocket is the fan-out through WebSockets beside the same through /stream.
func BenchmarkWebSocket(b *testing.B) {
	beside(b, "stream", pinnedRoom, rawGet("/stream"))
	beside(b, "websocket", pinnedRoom, shake("/ws"))
}

// ---- documents ----

// documents are README.md and the files that go on where it ends, with what each is in Chinese.
var documents = [][2]string{
	{"README.md", ".github/README.zh-CN.md"},
	{".github/running.md", ".github/running.zh-CN.md"},
	{".github/measured.md", ".github/measured.zh-CN.md"},
}

// documentsText is all of them in English.
func documentsText(t testing.TB) (text string) {
	t.Helper()
	for _, names := range documents {
		text += readFile(t, names[0])
	}
	return text
}

// blocks returns what the documents have between fences of this language.
func blocks(t testing.TB, language string) []string {
	t.Helper()
	all := allMatches(regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$"), documentsText(t))
	require(t, len(all) != 0, "the documents have no ```%s", language)
	return all
}

// adapt replaces each old text, which must be there, by the new one that follows it.
func adapt(t testing.TB, text string, oldnew ...string) string {
	t.Helper()
	for pair := range slices.Chunk(oldnew, 2) {
		require(t, strings.Contains(text, pair[0]), "no %q in\n%s", pair[0], text)
		text = strings.ReplaceAll(text, pair[0], pair[1])
	}
	return text
}

func writeFile(t testing.TB, path, text string) string {
	t.Helper()
	must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func readFile(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	return string(b)
}

// nginx is the command that runs nginx in a folder of its own, with a module and these servers.
func nginx(t testing.TB, module, servers string) *exec.Cmd {
	t.Helper()
	program, dir := need(t, "nginx", "apt-get install nginx-light"), t.TempDir()
	conf := module + "daemon off; master_process off; pid nginx.pid; events { worker_connections 8192; }\n" +
		"http {\naccess_log off;\n"
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		conf += kind + "_temp_path " + filepath.Join(dir, kind) + ";\n"
	}
	file := writeFile(t, filepath.Join(dir, "nginx.conf"), conf+servers+"}\n")
	return exec.Command(program, "-e", "stderr", "-p", dir, "-c", file)
}

// caddy is the command that runs Caddy in a folder of its own, with these sites.
func caddy(t testing.TB, sites string) *exec.Cmd {
	t.Helper()
	program, dir := need(t, "caddy", "apt-get install caddy"), t.TempDir()
	file := writeFile(t, filepath.Join(dir, "Caddyfile"), "{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n}\n"+sites)
	cmd := exec.Command(program, "run", "--adapter", "caddyfile", "--config", file)
	cmd.Env = []string{"HOME=" + dir, "XDG_DATA_HOME=" + dir, "XDG_CONFIG_HOME=" + dir}
	return cmd
}

// behindNginx runs README's block for one process in front of a room, without what a pattern finds, and
// returns the address. The words behind that in the listen directive, and directives after it, are how.
// ADDR in the room's arguments is the address, too.
func behindNginx(t testing.TB, without, how string, args ...string) (addr string) {
	t.Helper()
	block := blocks(t, "nginx")[0]
	addr, _ = serve(t, func(addr string) *exec.Cmd {
		args := slices.Clone(args)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "ADDR", addr)
		}
		_, room, _ := strings.Cut(startRoom(t, args...).url, "//")
		block := regexp.MustCompile(`listen [^;]*;(\s*listen [^;]*;)*`).ReplaceAllLiteralString(block, "listen "+addr+how+";")
		block = regexp.MustCompile(cmp.Or(without, "^$")).ReplaceAllLiteralString(block, "")
		return nginx(t, "", adapt(t, block, "127.0.0.1:8989", room, addr, addr))
	})
	return addr
}

// TestBehindNginx runs the room behind the configuration that README recommends.
func TestBehindNginx(t *testing.T) {
	t.Parallel()
	url := "http://" + behindNginx(t, "", "", "-rate", "0.01") // so slow that no token comes back while it runs
	c := newClient(t, url).login("小明")
	s := c.stream("", "")
	s.until("ping")
	last := ""
	for _, text := range []string{"one", "two", "three"} {
		got := c.post(text, "Origin: "+url)
		require(t, got == 204, "posting %q from the room's page: got %d, want 204", text, got)
		e := s.message() // by itself, before the next is sent
		last = e.id
		expect(t, e.said() == "小明: "+text, "heard %q, want %q", e.said(), text)
	}
	same(t, c.newcomer(), []string{"one", "two", "three"}, "polling gives")
	waiting := c.stream("wait=25s", last)
	waiting.until("ping")
	c.say("four")
	waiting.hears("小明: four")
	waiting.until("end")

	same(t, c.post("x", "Origin: http://other.example"), 403, "posting from another site's page")
	expect(t, !newClient(t, url).cookie("/login", "user=x", "X-Forwarded-Proto: https").Secure,
		"over HTTP the cookie is Secure, because the client said so")
	stranger, status := newClient(t, url), 0
	for i := range 40 {
		status = stranger.post("x", fmt.Sprintf("X-Forwarded-For: 192.0.2.%d", i))
	}
	same(t, status, 429, "a stranger who claims another address each time: the 40th message")
}

// TestBelowAPath has two rooms below two paths of one host, behind the blocks of running.md.
func TestBelowAPath(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(t *testing.T, addr, a, b string) *exec.Cmd{
		"nginx": func(t *testing.T, addr, a, b string) *exec.Cmd {
			block, upgrade := blocks(t, "nginx")[2], regexp.MustCompile(`(?s)map .*?}`).FindString(blocks(t, "nginx")[0])
			return nginx(t, "", upgrade+"\nserver {\nlisten "+addr+";\n"+adapt(t, block, "127.0.0.1:8989", a)+
				adapt(t, block, "127.0.0.1:8989", b, "/chat/", "/other/")+"}\n")
		},
		"Caddy": func(t *testing.T, addr, a, b string) *exec.Cmd {
			block := adapt(t, blocks(t, "caddyfile")[1], "example.org {", "")
			block = strings.TrimSuffix(strings.TrimSpace(block), "}")
			return caddy(t, "http://:"+addr[strings.LastIndex(addr, ":")+1:]+" {\nbind 127.0.0.1\n"+adapt(t, block, "127.0.0.1:8989", a)+
				adapt(t, block, "127.0.0.1:8989", b, "/chat", "/other")+"}\n")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			room, other := startRoom(t), startRoom(t)
			addr, _ := serve(t, func(addr string) *exec.Cmd {
				return start(t, addr, strings.TrimPrefix(room.url, "http://"), strings.TrimPrefix(other.url, "http://"))
			})
			site := "http://chat.test" + addr[strings.LastIndex(addr, ":"):]
			b := startBrowser(t)
			b.cdp("Page.addScriptToEvaluateOnNewDocument", map[string]any{"source": short + lessonScript})
			b.open(site + "/chat") // to the login, and from there to the room
			b.wait("the login", "location.pathname === '/chat/login'")
			b.keys("#user", "小明\uE007")
			b.wait("the room is live", "location.pathname === '/chat/' && state() === 'live'")
			if got := call[[]struct{ Path string }](b, "GET", "/cookie", nil); len(got) != 1 || got[0].Path != "/chat/" {
				t.Errorf("the browser has the cookies %v, want one for /chat/", got)
			}
			b.say("below a path")
			b.hasText("below a path")
			newClient(t, room.url).say("from elsewhere")
			b.hasText("from elsewhere")
			if got := string(b.cdp("Target.getTargets", nil)); !strings.Contains(got, site+"/chat/assets/stream.js") {
				t.Errorf("no shared worker: %s", got)
			}
			js[any](b, "window.same = true; $('#text').value = 'a draft'; $('#text').dispatchEvent(new Event('input'))")
			chat := b.tab()

			b.newTab() // another name in the other room is nothing to the first
			b.cdp("Page.addScriptToEvaluateOnNewDocument", map[string]any{"source": short + lessonScript})
			b.login(site+"/other", "Ada")
			b.checks(check{"the other room has other messages, and no draft of the first", "$('.me').textContent === 'Ada' && !texts().length && !$('#text').value"})

			b.open(site + "/chat/?view=projector")
			b.wait("the projector shows the room", "state() === 'live' && texts().length === 2")
			b.checks(check{"and where to join", fmt.Sprintf("$('.address b').textContent === '%s/chat'", site)})

			b.open(site + "/chat/lesson")
			b.wait("all ways receive", "state() === 'live'")
			b.keys("#message", "from the lesson\uE007")
			b.wait("it comes by all of them", "ways.every((name) => lines(name).join() === '小明: from the lesson')")
			b.wait("its request is shown as it is", "raw('#request')[0] === 'GET /chat/stream?wait=0 HTTP/1.1'")
			b.checks(check{"the exact bytes are found", "num('polling', 'bytes') > 0 && [...way('polling').querySelectorAll('.bar')].every((bar) => bar.dataset.state)"},
				check{"a way back", "$('header a').pathname === '/chat/'"})
			b.cdp("Network.setCookie", map[string]any{"url": site + "/chat/", "path": "/chat/", "name": "chat_session", "value": "v1.of.nobody"})
			b.keys("#message", "without a session\uE007")
			b.wait("the login", "location.pathname === '/chat/login'")
			b.keys("#user", "小明\uE007")
			b.wait("which leads back", "location.pathname === '/chat/lesson' && state() === 'live'")
			b.checks(check{"once", "!document.cookie"})

			b.toTab(chat)
			b.hasText("from the lesson")
			b.checks(check{"the first room's page has stayed", "window.same && $('#text').value === 'a draft'"})
			b.click("#logout button")
			b.wait("logged out", "location.pathname === '/chat/login'")

			type entry struct{ Message string }
			urls := regexp.MustCompile(`"request":{[^}]*?"url":"(http[^"]*)"`)
			for _, e := range call[[]entry](b, "POST", "/se/log", map[string]any{"type": "performance"}) {
				if strings.Contains(e.Message, `"Network.requestWillBeSent"`) {
					for _, asked := range allMatches(urls, e.Message) {
						if !strings.HasPrefix(asked, site+"/chat") && !strings.HasPrefix(asked, site+"/other/") {
							t.Errorf("a request to %s", asked)
						}
					}
				}
			}
		})
	}
}

// TestProxyThatChangesHost has a proxy that sends its own idea of Host.
func TestProxyThatChangesHost(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{nil, {"-origin", "http://ADDR"}} {
		addr := behindNginx(t, `proxy_set_header Host [^;]*;`, "", args...)
		got := newClient(t, "http://"+addr).do("POST", "/post", "message=x", "Origin: http://"+addr)
		expect(t, args == nil || got.status == 204, "with -origin: got %d, want 204", got.status)
		expect(t, args != nil || got.status == 403 && strings.Contains(got.body, "-origin"),
			"without -origin: got %d %q, want 403 and what to do", got.status, got.body)
	}
}

// TestNginxWithTLS has people come by https.
func TestNginxWithTLS(t *testing.T) {
	t.Parallel()
	cert, key := selfSigned(t)
	url := "https://" + behindNginx(t, "", " ssl; ssl_certificate "+cert+"; ssl_certificate_key "+key)
	c := newClient(t, url)
	c.http.Transport.(*http.Transport).TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	expect(t, c.cookie("/login", "user=x", "Origin: "+url).Secure, "over HTTPS the cookie is not Secure")
	s := c.stream("", "")
	same(t, c.post("hello", "Origin: "+url), 204, "posting from the room's page")
	s.hears("x: hello")
}

// selfSigned writes a certificate, changed like this, and its key.
func selfSigned(t testing.TB, changes ...func(*x509.Certificate)) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	for _, change := range changes {
		change(template)
	}
	cert, err := x509.CreateCertificate(cryptorand.Reader, template, template, key.Public(), key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		return writeFile(t, filepath.Join(dir, name), string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
	}
	return write("cert.pem", "CERTIFICATE", cert), write("key.pem", "PRIVATE KEY", keyDER)
}

// A proxied room is two processes, on the two addresses that a proxy knows.
type proxied struct {
	t         testing.TB
	redis     *redisServer
	ports     [2]string
	processes [2]*program
	url       string
}

// startProxied starts them and the proxy that command runs at a port.
func startProxied(t testing.TB, command func(p *proxied, port string) *exec.Cmd) *proxied {
	t.Helper()
	p := &proxied{t: t, redis: startRedis(t)}
	for i := range p.ports {
		p.ports[i] = freePort(t)
		p.begin(i)
	}
	serve(t, func(addr string) *exec.Cmd {
		_, port, _ := net.SplitHostPort(addr)
		p.url = "https://localhost:" + port
		return command(p, port)
	})
	return p
}

func (p *proxied) begin(i int) {
	p.t.Helper()
	p.processes[i] = startProcess(p.t, "-addr", "127.0.0.1:"+p.ports[i], "-redis", p.redis.addr).joined()
}

// client is one that speaks HTTP/2 to the proxy, once that answers.
func (p *proxied) client(name string) *client {
	p.t.Helper()
	c := newClient(p.t, p.url)
	transport := c.http.Transport.(*http.Transport)
	transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // the test made the certificate
	transport.ForceAttemptHTTP2 = true
	eventually(p.t, "the proxy to answer", func() bool {
		resp, err := c.send(context.Background(), "GET", "/healthz", "")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == 200 && resp.ProtoMajor == 2
	})
	return c.login(name)
}

// follow reads the room as a browser does, coming back with the last id, until the message
// "last", and returns what was heard.
func (c *client) follow(opened func()) (words []string) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	for after := ""; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		resp, err := c.send(ctx, "GET", "/stream?after="+url.QueryEscape(after), "")
		if err != nil {
			continue
		}
		opened()
		for e := range events(resp.Body) {
			after = cmp.Or(e.id, after)
			words = append(words, heard([]event{e})...)
			if e.kind == "message" && e.text() == "last" {
				resp.Body.Close()
				return words
			}
		}
		resp.Body.Close()
	}
	return append(words, "the end of patience")
}

// survives checks a room behind a proxy: events come one by one, the proxy says who and how,
// and while one process is killed, started anew and the other one stopped, everybody hears
// everything once. A failed post may be tried again, as the page does, at most tries times.
func (p *proxied) survives(tries int) {
	t := p.t
	t.Helper()
	c := p.client("小明")
	live := c.stream("", "")
	live.until("ping")
	for i := range 5 { // each arrives before the next is posted
		c.say(fmt.Sprint("one by one ", i))
		got := live.next(patience)
		require(t, got.said() == fmt.Sprint("小明: one by one ", i), "behind the proxy came %v", got)
	}
	expect(t, c.cookie("/login", form("user", "小明")).Secure, "behind TLS the cookie is not Secure")
	same(t, c.post("own page", "Origin: "+p.url), 204, "a post of the page itself")
	same(t, c.post("other page", "Origin: https://other.example"), 403, "a post of another site's page")

	var readers, open sync.WaitGroup
	words := make([][]string, 10)
	open.Add(len(words))
	for i := range words {
		readers.Go(func() { words[i] = c.follow(sync.OnceFunc(open.Done)) })
	}
	open.Wait()
	var want []string
	say := func(text string) {
		want = append(want, text)
		for try := 1; ; try++ {
			got := c.postKey(fmt.Sprintf("key-of-message-%d", len(want)), text)
			if got == 204 {
				return
			}
			if try == tries {
				t.Errorf("posting %q: got %d at try %d, want 204", text, got, try)
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	for i, step := range []func(){
		p.processes[0].kill,
		func() { p.begin(0) },
		func() { p.processes[1].stop() },
	} {
		done := make(chan struct{})
		go func() { defer close(done); step() }()
		for j, going := 0, true; going || j < 30; j++ {
			select {
			case <-done:
				going = false
			default:
			}
			say(fmt.Sprintf("step %d, message %d", i, j))
		}
	}
	say("last")
	readers.Wait()
	for i, got := range words {
		got = got[max(0, slices.Index(got, want[0])):]
		expect(t, slices.Equal(got, want), "reader %d heard\n%q\nwant\n%q", i, got, want)
	}
}

func TestProcessesBehindNginx(t *testing.T) {
	t.Parallel()
	const challenge = "/.well-known/acme-challenge/"
	plain, web := "", t.TempDir()
	must(t, os.MkdirAll(web+challenge, 0o700))
	writeFile(t, web+challenge+"token", "proof")
	p := startProxied(t, func(p *proxied, port string) *exec.Cmd {
		plain = freePort(t)
		cert, key := selfSigned(t)
		return nginx(t, "", adapt(t, blocks(t, "nginx")[1], // the first is for one process
			"127.0.0.1:8989", "127.0.0.1:"+p.ports[0], "127.0.0.1:8990", "127.0.0.1:"+p.ports[1],
			"listen 80;", "listen 127.0.0.1:"+plain+";", "listen 443 ", "listen 127.0.0.1:"+port+" ",
			"listen [::]:80;", "listen 127.0.0.2:"+plain+";", "listen [::]:443 ", "listen 127.0.0.2:"+port+" ", // not all have IPv6
			"/etc/letsencrypt/live/chat.example.org/fullchain.pem", cert, "/etc/letsencrypt/live/chat.example.org/privkey.pem", key,
			"/var/www/html", web))
	})
	p.survives(1)

	// A post whose process dies between Redis and the answer, and to which its sender gave no key,
	// is in the room once.
	c := p.client("ann")
	for try := 1; ; try++ {
		p.begin(1)
		before := len(p.redis.history())
		p.redis.signal("STOP")
		var posts sync.WaitGroup
		var late atomic.Bool
		for i := range 4 {
			posts.Go(func() {
				if got := c.post(fmt.Sprintf("without a key %d-%d", try, i)); got == 503 {
					late.Store(true)
				} else if got != 204 {
					t.Errorf("post %d without a key: got %d, want 204", i, got)
				}
			})
		}
		eventually(t, "both processes to have sent theirs", func() bool { return p.redis.unread() == 2 })
		p.processes[1].kill()
		p.redis.signal("CONT")
		posts.Wait()
		if late.Load() && try < 5 { // all this takes longer than a post may
			continue
		}
		keys := map[string]bool{}
		items := p.redis.history()[before:]
		for _, item := range items {
			if strings.Contains(item, fmt.Sprintf("without a key %d-", try)) {
				keys[nameOf(item)] = true
			}
		}
		if len(keys) != 4 { // in more items, if a second attempt came before the first one was heard
			t.Errorf("4 posts, some of them sent twice, are %d messages in %d items", len(keys), len(items))
		}
		break
	}

	// While Redis is away the pages are there.
	p.begin(1)
	p.redis.kill()
	for range 5 {
		same(t, c.post("x"), 503, "posting without Redis")
		same(t, c.get("/login").status, 200, "the login form without Redis")
	}
	for _, host := range []string{"http://127.0.0.1:", "http://127.0.0.2:"} {
		got := newClient(t, host+plain).get("/login")
		to := got.header.Get("Location")
		expect(t, got.status == 301 && strings.HasPrefix(to, "https://") && strings.HasSuffix(to, "/login"),
			"without TLS: got %d to %q, want 301 to https", got.status, to)
	}
	same(t, newClient(t, "http://127.0.0.1:"+plain).get(challenge+"token").body, "proof", "who gives certificates gets")
}

func TestProcessesBehindCaddy(t *testing.T) {
	t.Parallel()
	p := startProxied(t, func(p *proxied, port string) *exec.Cmd {
		return caddy(t, adapt(t, blocks(t, "caddyfile")[0],
			"chat.example.org {", "https://localhost:"+port+" {\n\tbind 127.0.0.1\n\ttls internal",
			"127.0.0.1:8989", "127.0.0.1:"+p.ports[0], "127.0.0.1:8990", "127.0.0.1:"+p.ports[1]))
	})
	p.survives(30)

	// It learns soon that a process is away, and then no post goes there any more.
	p.begin(1)
	c := p.client("ann")
	p.processes[0].kill()
	eventually(t, "Caddy to turn to the one that is left", func() bool {
		for range 20 {
			if c.post("hello") != 204 {
				return false
			}
		}
		return true
	})
}

func TestService(t *testing.T) {
	t.Parallel()
	analyze := need(t, "systemd-analyze", "apt-get install systemd")
	unit := blocks(t, "ini")[0]
	file := writeFile(t, filepath.Join(t.TempDir(), "chat@8989.service"), adapt(t, unit, "/usr/local/bin/chat", buildBinary(t)))
	for _, args := range [][]string{
		{"verify", "--man=no", "--recursive-errors=no", file},
		{"security", "--offline=yes", "--no-pager", "--threshold=15", file}, // of 100, which is unprotected
	} {
		out, err := exec.Command(analyze, args...).CombinedOutput()
		if err != nil || args[0] == "verify" && len(out) > 0 { // a key it does not know is but a warning
			t.Errorf("systemd-analyze %s: %v\n%s", args[0], err, out)
		}
	}
	command := regexp.MustCompile(`(?m)^ExecStart=\S+ (.*)$`).FindStringSubmatch(unit)
	require(t, command != nil, "the unit starts nothing")
	checkFlags(t, strings.ReplaceAll(command[1], "%i", "8989"))
	container := regexp.MustCompile(`(?m)^  chat: { image: goreleaser\.ko\.local, command: \[(-redis), "(redis:6379)"\], ports: \["8989:8989"\]`).FindStringSubmatch(blocks(t, "yaml")[0])
	require(t, container != nil, "the container does not find Redis, or the port is not open")
	checkFlags(t, container[1]+" "+container[2])
}

// checkFlags fails unless chat takes these arguments.
func checkFlags(t *testing.T, args string) {
	t.Helper()
	_, err := configure(strings.Fields(args), environ(), t.Output())
	expect(t, err == nil, "chat %s: %v", args, err)
}

// Every line of shell in the documents is run, or its flags are read; curl and redis-cli speak to
// a live room.
func TestShellLines(t *testing.T) {
	t.Parallel()
	need(t, "curl", "apt-get install curl")
	need(t, "redis-cli", "apt-get install redis-tools")
	sh := need(t, "sh", "part of every Unix")
	r := startRedis(t)
	room := startProcess(t, "-redis", r.addr).joined()
	_, port, _ := strings.Cut(r.addr, ":")
	dir, ci := t.TempDir(), readFile(t, ".ci/run")
	for line := range strings.Lines(strings.Join(blocks(t, "sh"), "")) {
		line = strings.TrimSpace(strings.NewReplacer("http://localhost:8989", room.url, "redis-cli ", "redis-cli -p "+port+" ",
			"hello from curl", "hello from curl: C++ & 100%41").Replace(line)) // what a student may put there
		endless := strings.Contains(line, "curl -N") || strings.Contains(line, "SUBSCRIBE")
		switch {
		case testing.Short() && strings.HasPrefix(strings.TrimPrefix(line, "CGO_ENABLED=0 "), "go "): // it builds once more
		case strings.Contains(line, "./chat"): // the address and Redis of the test come last and win
			line = strings.Replace(line, "./chat", `exec "$0"`, 1) + ` "$@"`
			args := []string{}
			if strings.Contains(line, "-redis") {
				args = []string{"-redis", r.addr}
			}
			startCommand(t, args, sh, "-c", line, buildBinary(t)).joined()
		case endless: // it must hear what is said while it runs
			p := launch(t, exec.Command(sh, "-c", "exec "+line))
			n := 0
			eventually(t, line+" to hear a message", func() bool {
				n++
				newClient(t, room.url).post(fmt.Sprint("heard ", n))
				return strings.Contains(p.out.String(), "anonymous: heard")
			})
		case strings.HasPrefix(line, "curl ") || strings.HasPrefix(line, "redis-cli "):
			for range 2 { // as a whole class runs it
				cmd := exec.Command(sh, "-c", strings.Replace(line, "curl ", "curl -sS --fail ", 1))
				cmd.Dir = dir
				out, err := cmd.CombinedOutput()
				expect(t, err == nil, "%s: %v\n%s", line, err, out)
			}
		case strings.Contains(line, "go build"):
			line = adapt(t, line, "-o chat ", "-o '"+filepath.Join(t.TempDir(), "chat")+"' ")
			succeeds(t, exec.Command(sh, "-c", line))
		case line == "go run .":
			succeeds(t, exec.Command("go", "run", ".", "-version"))
		case strings.HasPrefix(line, "apt-get update"): // .ci/run does, if it has the same packages
			packages, _, _ := strings.Cut(line[strings.Index(line, " -y ")+4:], " &&")
			for _, name := range strings.Fields(packages) {
				expect(t, strings.Contains(ci, "packages+=("+name+")"), ".ci/run does not install %s", name)
			}
		default:
			t.Errorf("a document has %q, and nothing tries it", line)
		}
	}
	for _, args := range allMatches(regexp.MustCompile("`\\./chat ([^`]*)`"), documentsText(t)) {
		checkFlags(t, args)
	}
	got := said(newClient(t, room.url).poll(""))
	for _, want := range []string{"anonymous: hello from curl: C++ & 100%41", "anonymous: said once", "小明: hello", "hi"} {
		same(t, len(got)-len(slices.DeleteFunc(slices.Clone(got), func(line string) bool { return line == want })), 2,
			"after the lines of the documents the room has %q, want %q twice", got, want)
	}
}

// What README.md shows of an answer is one.
func TestAnswerInReadme(t *testing.T) {
	t.Parallel()
	shown := regexp.MustCompile("(?s)```\n\\$ curl 'http://localhost:8989/stream\\?wait=0'\n(.*?)```").FindStringSubmatch(readFile(t, "README.md"))
	require(t, shown != nil, "README.md shows no answer of /stream?wait=0")
	c := newClient(t, startRoom(t).url)
	c.say("hello from curl")
	answer := c.get("/stream?wait=0").body
	alike := func(text string) string {
		text = regexp.MustCompile(`[A-Z2-7]{26}~[a-z2-7]{8}`).ReplaceAllString(text, "<id>")
		return regexp.MustCompile(`\d\d:\d\d:\d\d`).ReplaceAllString(text, "<time>")
	}
	want, got := alike(shown[1]), alike(answer)
	expect(t, got == want && strings.Count(got, "<id>") == 2, "an answer is\n%s\nin README.md\n%s", got, want)
}

// The number of readers in running.md is the one that the limits give.
func TestReadersOfALimit(t *testing.T) {
	_, streams := capacity(1024)
	want := fmt.Sprintf("of 1024 it serves %d readers", streams)
	expect(t, strings.Contains(inOneLine(readFile(t, ".github/running.md")), want), "running.md does not say %q", want)
}

// inOneLine makes each run of white space a space.
func inOneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// Each document in Chinese has the same commands, configurations and numbers.
func TestReadmeInChinese(t *testing.T) {
	for _, names := range documents {
		english, chinese := readFile(t, names[0]), readFile(t, names[1])
		for what, re := range map[string]string{
			"blocks":          "(?ms)^```(.*?)^```$",
			"rows of flags":   "(?m)^\\| (`[^|]+\\|[^|]+)\\|",
			"headings' ranks": "(?m)^(#+) ",
		} {
			want, got := allMatches(regexp.MustCompile(re), english), allMatches(regexp.MustCompile(re), chinese)
			expect(t, (len(want) != 0 || what == "rows of flags" && names[0] != "README.md") && slices.Equal(got, want),
				"%s: %s has %q, %s %q", what, names[1], got, names[0], want)
		}
		numbers := regexp.MustCompile(`\b(\d{2,})\b`)
		want, got := allMatches(numbers, english), allMatches(numbers, chinese)
		slices.Sort(want)
		slices.Sort(got)
		expect(t, slices.Equal(slices.Compact(got), slices.Compact(want)), "%s has the numbers %s, %s %s", names[1], got, names[0], want)
	}
}

// Every link from a document leads to a file that is there, in the archives of a release too, and
// to a heading that it has; and README.md leads to every document, in its language.
func TestLinksOfDocuments(t *testing.T) {
	fences, links := regexp.MustCompile("(?ms)^```.*?^```$"), regexp.MustCompile(`\]\(([^)\s]+)\)`)
	anchors := func(name string) (all []string) { // as GitHub makes them
		for _, heading := range allMatches(regexp.MustCompile("(?m)^#+ (.*)$"), fences.ReplaceAllString(readFile(t, name), "")) {
			heading = regexp.MustCompile(`[^\p{L}\p{M}\p{N}_ -]`).ReplaceAllString(strings.ToLower(heading), "")
			all = append(all, strings.ReplaceAll(heading, " ", "-"))
		}
		return all
	}
	archived := allMatches(regexp.MustCompile(`(?m)^ +- src: (\S+)`), readFile(t, ".goreleaser.yml"))
	var linked [2][]string // from README, by language
	for _, names := range documents {
		for lang, name := range names {
			for _, link := range allMatches(links, fences.ReplaceAllString(readFile(t, name), "")) {
				file, heading, deep := strings.Cut(link, "#")
				to := name
				if file != "" {
					to = filepath.ToSlash(filepath.Join(filepath.Dir(name), file))
				}
				if to == "../../releases" { // of a page that shows a file of the repository
					continue
				}
				if name == documents[0][lang] {
					linked[lang] = append(linked[lang], to)
				}
				if _, err := os.Stat(to); err != nil {
					t.Errorf("%s links to %s: %v", name, link, err)
					continue
				}
				if deep && !slices.Contains(anchors(to), heading) {
					t.Errorf("%s links to %s, where the headings are %q", name, link, anchors(to))
				}
				if !slices.ContainsFunc(archived, func(pattern string) bool {
					matches, err := filepath.Match(pattern, filepath.FromSlash(to))
					return matches && err == nil
				}) {
					t.Errorf("%s links to %s, which is not in the archives: %q", name, to, archived)
				}
			}
		}
	}
	for _, names := range documents[1:] {
		for lang, name := range names {
			expect(t, slices.Contains(linked[lang], name), "%s does not link to %s", documents[0][lang], name)
		}
	}
}

// What the manual in main.go, the documents, -h and the files say must agree.
func TestDocumentsAgree(t *testing.T) {
	source, readme, running := readFile(t, "main.go"), readFile(t, "README.md"), readFile(t, ".github/running.md")
	manual, _, _ := strings.Cut(source, "\npackage main\n")
	var help bytes.Buffer
	must(t, run(context.Background(), []string{"-h"}, environ(), &help, io.Discard))
	flags := regexp.MustCompile(`(?m)^\s*-(\w+)`)
	inHelp := allMatches(flags, help.String())
	require(t, len(inHelp) >= 6, "-h lists %q", inHelp)
	inManual := allMatches(flags, manual)
	inReadme := allMatches(regexp.MustCompile("(?m)^\\| `-(\\w+)"), readme)
	for _, own := range []string{"version", "h"} { // the flag package keeps quiet about -h
		if !slices.Contains(inHelp, own) {
			inHelp = append(inHelp, own)
		}
	}
	slices.Sort(inHelp)
	for name, got := range map[string][]string{"the manual": inManual, "README.md": inReadme} {
		slices.Sort(got)
		expect(t, slices.Equal(got, inHelp), "%s lists the flags %q, -h %q", name, got, inHelp)
	}
	for _, d := range regexp.MustCompile(`-(\w+).*\n?.*\(default "?([^")\n]+)"?\)`).FindAllStringSubmatch(help.String(), -1) {
		if d[1] == "redis" {
			continue // its default is a sentence
		}
		row := regexp.MustCompile("\\| `-" + d[1] + ".*").FindString(readme)
		expect(t, strings.Contains(row, "`"+d[2]+"`"), "README.md on -%s does not give its default %s: %q", d[1], d[2], row)
		expect(t, regexp.MustCompile(`(?s)-`+d[1]+` .{0,200}default "?`+regexp.QuoteMeta(d[2])).MatchString(manual),
			"the manual on -%s does not give its default %s", d[1], d[2])
	}
	for _, name := range allMatches(regexp.MustCompile(`getenv\("(\w+)"\)`), source) {
		expect(t, strings.Contains(manual, "$"+name) && strings.Contains(readme, name), "%s is missing in the manual or in README.md", name)
	}
	words := []string{"no", "one", "two", "three", "four", "five"} // small numbers are spelled out
	for _, test := range []struct{ name, text, says string }{
		{"README.md", readme, fmt.Sprintf("a name has %d characters", maxName)},
		{"README.md", readme, fmt.Sprintf("a message %d", maxMessage)},
		{"README.md", readme, fmt.Sprintf("a form %d KiB", maxBody>>10)},
		{"README.md", readme, fmt.Sprintf("header %d KiB", maxHeader>>10)},
		{"README.md", readme, fmt.Sprintf("session %d days", int(sessionLife.Hours())/24)},
		{"README.md", readme, fmt.Sprintf("newest %d messages", ringSize)},
		{"README.md", readme, fmt.Sprintf("messages a second after a burst of %d", postBurst)},
		{"README.md", readme, fmt.Sprintf("%d logins at once and %d a second after that", loginBurst, loginRate)},
		{"README.md", readme, fmt.Sprintf("%d wrong passwords at once and %s a second after that", guessBurst, words[guessRate])},
		{"README.md", readme, fmt.Sprintf("over %s to %s seconds", words[retryLow/1000], words[retryHigh/1000])},
		{"README.md", readme, fmt.Sprintf("%d messages at once and %d a second after that", floodBurst, floodRate)},
		{"README.md", readme, fmt.Sprintf("keeps %d entries, of which the newest %d are the history", listSize(ringSize), ringSize)},
		{"README.md", readme, fmt.Sprintf("older by more than %d messages", ringSize)},
		{"README.md", readme, fmt.Sprintf("more than %d messages behind the first", listSize(ringSize)-ringSize)},
		{"README.md", readme, fmt.Sprintf("Every %d s each process sends a random word", syncEvery/time.Second)},
		{"running.md", running, fmt.Sprintf("the newest %d entries, of which %d are the history", listSize(ringSize), ringSize)},
		{"running.md", running, fmt.Sprintf("a random word of each process every %d s", syncEvery/time.Second)},
		{"running.md", running, fmt.Sprintf("drops both %d days after the last process", int(keptFor.Hours())/24)},
		{"running.md", running, fmt.Sprintf("come back within %s seconds", words[retryHigh/1000])},
		{"README.md", readme, fmt.Sprintf("A `ping` every %d s", heartbeat/time.Second)},
		{"the manual", manual, fmt.Sprintf("at most %d (default", ringSize)},
		{"the manual", manual, fmt.Sprintf("after a burst of %d", postBurst)},
		{"the manual", manual, fmt.Sprintf("while it is among the newest %d;", ringSize)},
		{"the manual", manual, fmt.Sprintf("413 over %d KiB", maxBody>>10)},
		{"the manual", manual, fmt.Sprintf("413 over %d characters", maxMessage)},
		{"the manual", manual, fmt.Sprintf("after %d s of silence", heartbeat/time.Second)},
		{"the manual", manual, strings.Replace(fmt.Sprintf("at most %v)", maxWait), "1m0s", "a minute", 1)},
		{"the manual", manual, fmt.Sprintf("newest last. %d are kept, and the newest %d are the history", listSize(ringSize), ringSize)},
		{"the manual", manual, fmt.Sprintf("The newest %d messages live in each process", ringSize)},
		{"the manual", manual, fmt.Sprintf("every %d s a random word of each process", syncEvery/time.Second)},
		{"the manual", manual, fmt.Sprintf("chat_session for %d days", int(sessionLife.Hours())/24)},
		{"-h", help.String(), fmt.Sprintf("at most %d (default", ringSize)},
		{"-h", help.String(), fmt.Sprintf("after a burst of %d;", postBurst)},
	} {
		expect(t, strings.Contains(inOneLine(test.text), test.says), "%s does not say %q", test.name, test.says)
	}
	expect(t, stopTimeout < time.Second && strings.Contains(inOneLine(readme), "`SIGTERM` ends it in under a second"),
		"README.md does not say that SIGTERM ends it in under a second, or it is %v", stopTimeout)
	script := readFile(t, "assets/chat.js")
	expect(t, strings.Contains(script, fmt.Sprintf("MAX = %d", maxMessage)),
		"chat.js does not know that a message has %d characters at most", maxMessage)
	texts := readFile(t, "assets/strings.json")
	expect(t, strings.Count(texts, fmt.Sprintf(" %d ", maxName)) >= 2, "strings.json does not say that a name has %d characters at most", maxName)
	line := regexp.MustCompile(`go test -race .*`)
	same(t, line.FindString(readme), line.FindString(readFile(t, ".ci/run")), "README.md tests with")
}

// The binary needs nothing but redigo, and the folder holds nothing that is not announced.
func TestLayout(t *testing.T) {
	mod := readFile(t, "go.mod")
	expect(t, strings.Count(mod, "require") == 1 && strings.Contains(mod, "\nrequire github.com/gomodule/redigo "),
		"go.mod requires more than redigo:\n%s", mod)
	out, err := exec.Command("git", "ls-files").Output()
	if err != nil {
		t.Skip("not a git checkout")
	}
	var top []string
	for name := range strings.Lines(string(out)) {
		name, _, _ = strings.Cut(strings.TrimSpace(name), "/")
		if !strings.HasPrefix(name, ".") && !slices.Contains(top, name) {
			top = append(top, name)
		}
	}
	slices.Sort(top)
	same(t, top, []string{"LICENSE", "README.md", "assets", "go.mod", "go.sum", "main.go", "main_test.go"}, "the top level is")
}

// Every page is made in every language, links only to what exists, and brings no code of its
// own.
func TestPagesAreWhole(t *testing.T) {
	t.Parallel()
	s := newTestServer(t, &config{}, t.Logf)
	links := regexp.MustCompile(`(?:src|href|action)="([^"]*)"`)
	routes := []string{"", "./", "login", "logout", "post", "lesson"} // relative: the room may lie below a path
	names, _ := filepath.Glob("assets/*.html")
	for _, name := range names {
		for _, lang := range []string{"en", "zh"} {
			var b bytes.Buffer
			v := view{Lang: lang, T: s.texts[lang], Name: "小明", Error: "name_long", Password: true, View: "projector", Join: "http://192.0.2.1:8989"}
			same(t, s.pages.ExecuteTemplate(&b, filepath.Base(name), v), nil, "%s in %s", name, lang)
			for _, link := range allMatches(links, b.String()) {
				path, _, _ := strings.Cut(link, "?")
				_, err := assets.Open(path)
				expect(t, err == nil || slices.Contains(routes, path) || strings.HasPrefix(link, "#"),
					"%s in %s links to %q, which does not exist", name, lang, link)
			}
			same(t, regexp.MustCompile(`(?i)<script>|<style|\son\w+=|style="|javascript:|data:[a-z]`).FindString(b.String()), "",
				"%s in %s has code or style inline", name, lang)
		}
	}
}

func allMatches(re *regexp.Regexp, text string) (all []string) {
	for _, m := range re.FindAllStringSubmatch(text, -1) {
		all = append(all, m[1])
	}
	return all
}

// ---- benchmarks ----

// A crowd is readers on connections of their own, who count the messages that reach them. Each
// message of a benchmark has one "^", and after it the nanoseconds at which it was posted, as
// markText writes them.
type crowd struct {
	readers           int
	seen, size, reads atomic.Int64 // messages over all readers, bytes, and in so many reads
	want              atomic.Int64 // of seen, at which something is sent on arrived
	arrived           chan struct{}
	late              []chan time.Duration // of each reader: how old messages were; what does not fit is left out
}

func markText() string {
	return fmt.Sprintf("^%d is when this was posted, as long as people write in class", time.Now().UnixNano())
}

// eventsPlease is what an EventSource asks with.
var eventsPlease = raw("GET /stream HTTP/1.1", "Host: chat", "Accept: text/event-stream")

// gather connects readers by a request and waits until each has the head of its answer.
func gather(b *testing.B, readers int, addr, request string) *crowd {
	b.Helper()
	if limit := fileLimit(); limit < 2*readers+100 {
		b.Skipf("needs %d descriptors, may open %d", 2*readers+100, limit)
	}
	c := &crowd{readers: readers, arrived: make(chan struct{}, 1), late: make([]chan time.Duration, readers)}
	for i := range readers {
		conn, err := net.Dial("tcp", addr)
		must(b, err)
		b.Cleanup(func() { conn.Close() })
		io.WriteString(conn, request)
		c.late[i] = make(chan time.Duration, 1000)
		if n, err := conn.Read(make([]byte, 4096)); err != nil || n == 0 {
			b.Fatalf("the answer has no head: %v", err)
		}
		go c.read(conn, c.late[i])
	}
	return c
}

func (c *crowd) read(conn net.Conn, late chan<- time.Duration) {
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		c.size.Add(int64(n))
		c.reads.Add(1)
		got := int64(bytes.Count(buf[:n], []byte("^")))
		if _, after, found := bytes.Cut(buf[:n], []byte("^")); found && len(after) >= 19 {
			posted, _ := strconv.ParseInt(string(after[:19]), 10, 64)
			select {
			case late <- time.Since(time.Unix(0, posted)):
			default:
			}
		}
		if all, want := c.seen.Add(got), c.want.Load(); all >= want && all-got < want {
			c.arrived <- struct{}{}
		}
	}
}

// expect says how many more messages each reader gets, before they are posted; await waits until
// all have them.
func (c *crowd) expect(messages int) { c.want.Add(int64(messages * c.readers)) }

func (c *crowd) await(b *testing.B) {
	b.Helper()
	select {
	case <-c.arrived:
	case <-time.After(time.Minute):
		b.Fatalf("%d of %d deliveries came", c.seen.Load(), c.want.Load())
	}
}

// p99 returns how old a message was at most when it reached a reader, but for one in a hundred.
func (c *crowd) p99() time.Duration {
	var all []time.Duration
	for _, late := range c.late {
		for range len(late) {
			all = append(all, <-late)
		}
	}
	slices.Sort(all)
	if len(all) == 0 {
		return 0
	}
	return all[len(all)*99/100]
}

// BenchmarkFanout posts messages one after the other, each when all readers have the one before. It
// reports processor time: how long it takes, the pace says. The readers are sockets of this process,
// so their cost is in the figure too.
func BenchmarkFanout(b *testing.B) {
	for _, readers := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprint(readers, " readers"), func(b *testing.B) {
			room := startRoom(b, "-rate", "0")
			crowd := gather(b, readers, strings.TrimPrefix(room.url, "http://"), eventsPlease)
			c := newClient(b, room.url)
			before, _ := used(b, os.Getpid())
			b.ResetTimer()
			for range b.N {
				crowd.expect(1)
				c.say(markText())
				crowd.await(b)
			}
			after, _ := used(b, os.Getpid())
			deliveries := float64(b.N * readers)
			b.ReportMetric(float64((after-before).Nanoseconds())/deliveries, "cpu-ns/delivery")
			b.ReportMetric(float64(crowd.size.Load())/deliveries, "B/delivery")
		})
	}
}

// BenchmarkBeside is the fan-out to 2000 readers beside two other servers, each a process of its
// own on the first processor: nginx with nchan, and a loop that does nothing but write. Started
// under "taskset -c 1" the readers have the second one.
func BenchmarkBeside(b *testing.B) {
	beside(b, "chat", pinnedRoom, eventsPlease)
	beside(b, "nchan", startNchan, eventsPlease)
	beside(b, "loop", startLoop, eventsPlease)
}

func beside(b *testing.B, name string, start func(b *testing.B) (addr string, pid int), request string) {
	for _, mode := range []string{"burst", "steady"} {
		every := map[string]time.Duration{"steady": 20 * time.Millisecond}[mode] // 0: as fast as four can post
		b.Run(mode+"/"+name, func(b *testing.B) {
			addr, pid := start(b)
			few := gather(b, 100, addr, request) // what all readers share is there now
			_, before := used(b, pid)
			crowd := gather(b, 2000, addr, request)
			cpu, memory := used(b, pid)
			crowd.expect(b.N)
			reads := crowd.reads.Load()
			b.ResetTimer()
			publish(b, "http://"+addr+"/post", every)
			crowd.await(b)
			after, _ := used(b, pid)
			deliveries := b.N * (few.readers + crowd.readers)
			b.ReportMetric(float64((after-cpu).Nanoseconds())/float64(deliveries), "cpu-ns/delivery")
			b.ReportMetric(float64(b.N*crowd.readers)/float64(crowd.reads.Load()-reads), "messages/read")
			b.ReportMetric(float64(memory-before)/float64(crowd.readers), "B/reader")
			if every > 0 {
				b.ReportMetric(float64(crowd.p99().Microseconds())/1000, "p99-ms")
			}
		})
	}
}

// publish posts b.N messages, one at each tick, or as fast as four can.
func publish(b *testing.B, url string, every time.Duration) {
	post := func() {
		resp, err := http.Post(url, "application/x-www-form-urlencoded", strings.NewReader("message="+markText()))
		if err != nil {
			b.Error(err)
			return
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		expect(b, resp.StatusCode < 300, "posting: %s", resp.Status)
	}
	if every > 0 {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for range b.N {
			<-tick.C
			post()
		}
		return
	}
	var left atomic.Int64
	var posters sync.WaitGroup
	for range 4 {
		posters.Go(func() {
			for left.Add(1) <= int64(b.N) {
				post()
			}
		})
	}
	posters.Wait()
}

// pinned returns the command, to run on the first processor where that can be said.
func pinned(command ...string) []string {
	if path, err := exec.LookPath("taskset"); err == nil {
		return append([]string{path, "-c", "0"}, command...)
	}
	return command
}

func pinnedRoom(b *testing.B) (addr string, pid int) {
	room := startCommand(b, []string{"-rate", "0"}, pinned(buildBinary(b))...)
	return strings.TrimPrefix(room.url, "http://"), room.Process.Pid
}

func startNchan(b *testing.B) (addr string, pid int) {
	const module = "/usr/lib/nginx/modules/ngx_nchan_module.so"
	if _, err := os.Stat(module); err != nil {
		need(b, module, "apt-get install libnginx-mod-nchan")
	}
	return startPinned(b, func(addr string) *exec.Cmd {
		return nginx(b, "load_module "+module+";\n", "server {\nlisten "+addr+" backlog=4096;\n"+
			"nchan_channel_id room;\nnchan_message_buffer_length 10000;\n"+
			"location /stream { nchan_subscriber eventsource; nchan_subscriber_first_message newest; }\n"+
			"location /post { nchan_publisher; }\n}\n")
	})
}

func startLoop(b *testing.B) (addr string, pid int) {
	return startPinned(b, func(addr string) *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "CHAT_TEST_LOOP="+addr)
		return cmd
	})
}

// startPinned starts a server on the first processor.
func startPinned(b *testing.B, command func(addr string) *exec.Cmd) (addr string, pid int) {
	addr, p := serve(b, func(addr string) *exec.Cmd {
		cmd := command(addr)
		args := pinned(cmd.Args...)
		there := exec.Command(args[0], args[1:]...)
		there.Env = cmd.Env
		return there
	})
	return addr, p.Pid
}

// A loop is the least that a server can do: one write a delivery, and no id, deadline or history.
type loop struct {
	mu      sync.Mutex // guards readers
	readers []net.Conn
}

func (l *loop) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.Method == "POST" {
		text, _ := io.ReadAll(r.Body)
		frame := fmt.Appendf(nil, "data: %s\n\n", text)
		for _, reader := range l.readers {
			reader.Write(frame)
		}
		return
	}
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
		l.readers = append(l.readers, conn)
	}
}

// used returns the processor time and the resident memory of a process, as Linux tells them.
func used(b *testing.B, pid int) (cpu time.Duration, memory int64) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Skip("needs /proc")
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.Atoi(fields[11]) // in hundredths of a second
	system, _ := strconv.Atoi(fields[12])
	pages, _ := strconv.ParseInt(fields[21], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, pages * int64(os.Getpagesize())
}

// BenchmarkPost posts from 64 connections at once; each post is answered when its message is in
// the room. The others are what that is made of: the same requests to a handler that does
// nothing, and what a post does in Redis, on the Redis of a room that hears it, each connection
// waiting for its own. The client is as lean as redis-benchmark, so that it leaves the processors
// to what is measured.
func BenchmarkPost(b *testing.B) {
	b.Run("memory", func(b *testing.B) { postAtOnce(b, startRoom(b, "-rate", "0").url) })
	b.Run("redis", func(b *testing.B) { postAtOnce(b, startRedis(b).room("-rate", "0").joined().url) })
	b.Run("empty handler", func(b *testing.B) {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusNoContent)
		}))
		defer server.Close()
		postAtOnce(b, server.URL)
	})
	b.Run("transactions", transactionsAtOnce)
	b.Run("redis-benchmark", redisBenchmark)
}

// transactionsAtOnce sends the transactions of posts.
func transactionsAtOnce(b *testing.B) {
	server := startRedis(b)
	server.room("-rate", "0").joined()
	atOnce(b, 64, func(pb *testing.PB) error {
		c, err := redis.Dial("tcp", server.addr)
		if err != nil {
			return err
		}
		defer c.Close()
		for pb.Next() {
			id, line := newID(cryptorand.Text()), "[12:34:56] anonymous: hello"
			c.Send("MULTI")
			c.Send("RPUSH", "chat:history", id+" "+line)
			c.Send("LTRIM", "chat:history", -listSize(ringSize), -1)
			c.Send("PUBLISH", "chat:id", id)
			c.Send("PUBLISH", "chat", line)
			if _, err := c.Do("EXEC"); err != nil {
				return err
			}
		}
		return nil
	})
}

// redisBenchmark has redis-benchmark send the four commands of such a transaction. It cannot send
// MULTI, so they are a script. (It draws each __rand_int__ anew, so the list has other ids than the
// channel, which costs the same.)
func redisBenchmark(b *testing.B) {
	need(b, "redis-benchmark", "apt-get install redis-tools")
	server := startRedis(b)
	server.room("-rate", "0").joined()
	_, port, _ := net.SplitHostPort(server.addr)
	script := fmt.Sprintf("redis.call('RPUSH',KEYS[1],ARGV[1]) redis.call('LTRIM',KEYS[1],%d,-1) "+
		"redis.call('PUBLISH',KEYS[2],ARGV[2]) redis.call('PUBLISH',KEYS[3],ARGV[3])", -listSize(ringSize))
	id, line := "benchmark-____-__rand_int__~aaaaaaaa", "[12:34:56] anonymous: hello"
	b.ResetTimer()
	out, err := exec.Command("redis-benchmark", "-p", port, "-c", "64", "-n", strconv.Itoa(b.N), "-r", "1000000000000", "-q",
		"eval", script, "3", "chat:history", "chat:id", "chat", id+" "+line, id, line).CombinedOutput()
	require(b, err == nil && !bytes.Contains(out, []byte("rror")), "%v: %s", err, out)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "posts/s")
}

// postAtOnce posts from 64 connections, each waiting for its answer before it posts again.
func postAtOnce(b *testing.B, url string) {
	_, addr, _ := strings.Cut(url, "//")
	request := []byte("POST /post HTTP/1.1\r\nHost: " + addr + "\r\nContent-Length: 13\r\n" +
		"Content-Type: application/x-www-form-urlencoded\r\n\r\nmessage=hello")
	atOnce(b, 64, func(pb *testing.PB) error {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		defer conn.Close()
		answer := bufio.NewReader(conn)
		for pb.Next() {
			if _, err := conn.Write(request); err != nil {
				return err
			}
			status, err := answer.ReadString('\n')
			if !strings.HasPrefix(status, "HTTP/1.1 204 ") {
				return fmt.Errorf("got %q, %v, want 204", status, err)
			}
			for line := status; line != "\r\n"; {
				if line, err = answer.ReadString('\n'); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// atOnce runs work on so many goroutines, or a few more, and reports how many times a second.
func atOnce(b *testing.B, goroutines int, work func(pb *testing.PB) error) {
	procs := runtime.GOMAXPROCS(0)
	b.SetParallelism((goroutines + procs - 1) / procs)
	b.RunParallel(func(pb *testing.PB) {
		err := work(pb)
		expect(b, err == nil, "%v", err)
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "posts/s")
}

// BenchmarkResume is a reader that comes back and has missed a number of messages.
func BenchmarkResume(b *testing.B) {
	for _, missed := range []int{0, 100, 4000} {
		b.Run(fmt.Sprint(missed, " missed"), func(b *testing.B) {
			room := startRoom(b, "-rate", "0")
			c := newClient(b, room.url)
			last := c.sayAs("benchmark-resume-0000", "the last one seen")
			for range missed {
				c.say("a message of the usual length, as people write them in class")
			}
			b.ResetTimer()
			for range b.N {
				got := c.get("/stream?wait=0&after=" + last)
				require(b, strings.Count(got.body, "\nid: ") >= missed, "got %d messages, want %d", strings.Count(got.body, "\nid: "), missed)
			}
		})
	}
}
