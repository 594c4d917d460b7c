import android.content.Context;
import java.io.File;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import tersor.my_encoder.Model;
import tersor.my_encoder.ModelException;
import tersor.my_encoder.Weights;

/**
 * Calls the classes of an exported BERT in every way they have. Arguments: the folder of the app, with assets, and a file
 * for the elements of the output "hidden" for the ids (7 i + 1) % 50 of shape [2, 5], the last two of each row padding.
 */
public final class Check {
  private static final int BATCH = 2, LENGTH = 5, WIDTH = 16, CLASSES = 2, COUNT = BATCH * LENGTH;

  public static void main(String[] arguments) throws Exception {
    Path folder = Paths.get(arguments[0]);
    Context context = new Context(folder.toFile());
    Files.createDirectories(folder.resolve("files"));
    Files.write(folder.resolve("files/my_encoder-00000000.weights"), new byte[] {1});
    File weights = Weights.file(context);
    equal(folder.resolve("files").toFile().list().length, 1, "files, that of another version removed");
    long copied = weights.lastModified();
    equal(Weights.file(context).lastModified(), copied, "time of the file at the second call");

    long[] ids = new long[COUNT], mask = new long[COUNT];
    for (int i = 0; i < COUNT; i++) {
      ids[i] = (7 * i + 1) % 50;
      mask[i] = i % LENGTH < LENGTH - 2 ? 1 : 0;
    }
    try (Model model = new Model(weights, 2)) {
      Model.MainOutputs found = model.main(BATCH, LENGTH, ids, mask);
      equal(found.hidden.length, COUNT * WIDTH, "elements");
      ByteBuffer written = ByteBuffer.allocate(4 * found.hidden.length).order(ByteOrder.nativeOrder());
      written.asFloatBuffer().put(found.hidden);
      Files.write(Paths.get(arguments[1]), written.array());

      // buffers from position to limit
      LongBuffer idBuffer = bytes(8 * (COUNT + 3)).asLongBuffer(), maskBuffer = bytes(8 * COUNT).asLongBuffer();
      idBuffer.position(2);
      idBuffer.put(ids).position(2).limit(2 + COUNT);
      maskBuffer.put(mask).rewind();
      FloatBuffer hidden = bytes(4 * COUNT * WIDTH).asFloatBuffer(), logits = bytes(4 * BATCH * CLASSES).asFloatBuffer();
      model.main(BATCH, LENGTH, idBuffer, maskBuffer, hidden, logits);
      equal(idBuffer.position(), 2, "position, which stays");
      for (int i = 0; i < found.hidden.length; i++) equal(hidden.get(i), found.hidden[i], "element");
      for (int i = 0; i < found.logits.length; i++) equal(logits.get(i), found.logits[i], "logit");
      for (int i = 0; i < 2000; i++) model.main(BATCH, LENGTH, idBuffer, maskBuffer, hidden, logits);

      refused(2, () -> model.main(5, LENGTH, ids, mask));
      refused(2, () -> model.main(BATCH, 0, ids, mask));
      refused(2, () -> model.main(5, LENGTH, idBuffer, maskBuffer, hidden, logits));
      refused(3, () -> model.main(BATCH, LENGTH + 1, ids, mask));
      FloatBuffer small = bytes(4).asFloatBuffer();
      refused(3, () -> model.main(BATCH, LENGTH, idBuffer, maskBuffer, small, logits));
      thrown(IllegalArgumentException.class, () -> model.main(BATCH, LENGTH, LongBuffer.wrap(ids), maskBuffer, hidden, logits));
      LongBuffer swapped = ByteBuffer.allocateDirect(8 * COUNT).order(ByteOrder.BIG_ENDIAN).asLongBuffer();
      thrown(IllegalArgumentException.class, () -> model.main(BATCH, LENGTH, swapped, maskBuffer, hidden, logits));
      FloatBuffer constant = hidden.asReadOnlyBuffer();
      thrown(IllegalArgumentException.class, () -> model.main(BATCH, LENGTH, idBuffer, maskBuffer, constant, logits));
      ByteBuffer odd = bytes(8 * COUNT + 1);
      odd.position(1);
      LongBuffer shifted = odd.slice().order(ByteOrder.nativeOrder()).asLongBuffer();
      thrown(IllegalArgumentException.class, () -> model.main(BATCH, LENGTH, shifted, maskBuffer, hidden, logits));
      thrown(NullPointerException.class, () -> model.main(BATCH, LENGTH, null, mask));
      model.reset();
      equal(model.main(BATCH, LENGTH, ids, mask).hidden[0], found.hidden[0], "element after all those errors");
    }
    Model closed = new Model(weights, 1);
    closed.close();
    closed.close();
    thrown(IllegalStateException.class, () -> closed.main(BATCH, LENGTH, ids, mask));
    thrown(IllegalStateException.class, () -> closed.reset());
    refused(4, () -> new Model(new File("nowhere"), 1));
    refused(9, () -> new Model(weights, 1000));
    for (int i = 0; i < 200; i++) new Model(weights, 1 + i % 3).close();
    long maps = Files.lines(Paths.get("/proc/self/maps")).filter(line -> line.contains(".weights")).count();
    equal(maps, 0, "mappings of weights that are left");
    Path damaged = folder.resolve("damaged");
    Files.write(damaged, new byte[1000]);
    refused(5, () -> new Model(damaged.toFile(), 1));
    System.out.println("ok");
  }

  private static ByteBuffer bytes(int count) {
    return ByteBuffer.allocateDirect(count).order(ByteOrder.nativeOrder());
  }

  private static void refused(int status, Runnable call) {
    ModelException found = thrown(ModelException.class, call);
    equal(found.status, status, "status");
    if (found.getMessage().isEmpty()) throw new AssertionError("no message");
  }

  private static <T extends Throwable> T thrown(Class<T> kind, Runnable call) {
    try {
      call.run();
    } catch (Throwable found) {
      if (found.getClass() != kind) throw new AssertionError("not a " + kind, found);
      return kind.cast(found);
    }
    throw new AssertionError("no " + kind);
  }

  private static void equal(double found, double expected, String what) {
    if (found != expected) throw new AssertionError(what + ": " + found + ", not " + expected);
  }
}
